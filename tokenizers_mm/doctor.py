"""Report of what is installed, which device and kernels are live, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import platform
import re

import torch

from tokenizers_mm import kernels
from tokenizers_mm.kernels import _native


def report() -> list[str]:
    """Lines for a person to read."""
    lines = [f"tokenizers_mm  {_version('tokenizers_mm')}", f"python         {platform.python_version()}"]
    lines += [f"{name:<14} {_version(name)}" for name in ("torch", "torchvision", "timm", "omegaconf", "safetensors")]
    lines.append(f"threads        {torch.get_num_threads()}")
    if torch.cuda.is_available():
        lines += [f"device         {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("device         CPU (torch sees no CUDA device)")
    live = kernels.describe()
    lines.append(f"kernels        {live['path']} {live['isa']} ({live['reason']})")
    if live["isa_cap"] != _native.ISAS[-1]:
        lines.append(f"isa            at most {live['isa_cap']} (TOKENIZERS_MM_ISA)")
    for extra, packages in extras().items():
        missing = [package for package in packages if _version(package) == "missing"]
        state = "complete" if not missing else f"missing {', '.join(missing)}: pip install 'tokenizers_mm[{extra}]'"
        lines.append(f"extra {extra:<8} {state}")
    return lines


def extras() -> dict[str, list[str]]:
    """Packages of each optional extra, as the installed package states them, but for those of development."""
    found: dict[str, list[str]] = {}
    try:
        lines = importlib.metadata.requires("tokenizers_mm") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        lines = []
    for line in lines:
        match = re.fullmatch(r"([\w.-]+).*;.*\bextra == ['\"](\w+)['\"].*", line)
        if match and match[2] != "dev":
            found.setdefault(match[2], []).append(match[1])
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
