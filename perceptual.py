"""CLIPScore and LPIPS diversity, for modules that still import them from here."""
from clip_score import CLIP, PROTOCOLS, clip_score  # noqa: F401
from clip_score import main as main_clip
from lpips_score import load_lpips, lpips_diversity, lpips_features  # noqa: F401
from lpips_score import main as main_lpips
from fid import Mean, mean_over, mean_pair_distance, size_groups  # noqa: F401


def main(argv: list[str]) -> None:
    """Run the metric that the first word names, --metric=clip or --metric=lpips."""
    {"--metric=clip": main_clip, "--metric=lpips": main_lpips}[argv[0]](argv[1:])
