"""Reading our own format: a directory that `ImageTokenizer.save` wrote, a hub id, or the name of a shipped one."""

from tokenizers_mm.models.loading import SHIPPED as SHIPPED
from tokenizers_mm.models.loading import load as load
from tokenizers_mm.models.loading import shipped as shipped
