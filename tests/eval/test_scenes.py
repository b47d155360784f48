"""The rule that judges pictures of scenes: at least 95 % on real ones, and sober about what is none."""

import numpy as np
from PIL import Image, ImageFilter

from tokenizers_mm.data.scenes import make_scene
from tokenizers_mm.eval.scenes import judge_scene


def test_real_scenes_are_judged_right() -> None:
    for blur, least in ((0.0, 0.99), (1.5, 0.95)):
        right = 0
        for index in range(300):
            scene = make_scene(index, "heldout")
            picture = scene.render(64).filter(ImageFilter.GaussianBlur(blur))
            right += judge_scene(picture) == (scene.objects[0].shape, scene.objects[0].colour)
        assert right / 300 >= least


def test_what_is_no_scene_has_no_object() -> None:
    assert judge_scene(Image.new("RGB", (64, 64), (90, 90, 90))) is None
    speck = np.full((64, 64, 3), 20, dtype=np.uint8)
    speck[30:36, 30:36] = (214, 39, 40)
    assert judge_scene(Image.fromarray(speck)) is None
    rng = np.random.default_rng(0)
    for _ in range(5):
        judge_scene(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))  # noise: any answer, no error
        grey = rng.integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, 2)
        judge_scene(Image.fromarray(grey))
