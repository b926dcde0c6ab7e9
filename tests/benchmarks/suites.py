"""What the quality measurements compare: recipes by name, in suites."""

from __future__ import annotations

from typing import Any

Case = tuple[Any, str | None]  # recipe; calibration: None | "documentation" | "self" | "both"

DOCUMENTATION = "documentation"


def rtn(bits: int, group: int, *, search: bool = False) -> list[Any]:
    return [{"quantize-weights": {"bits": bits, "group_size": group, "search": search}}]


def rtn_rest(bits: int) -> list[Any]:
    """What an earlier pass left."""
    return [{"quantize-weights": {"bits": bits, "only_remaining": True}}]


def gptq(group: int, *before: Any, **options: Any) -> list[Any]:
    rest = {"quantize-weights": {"bits": 4, "group_size": group, "only_remaining": True}}
    return [*before, {"gptq": {"bits": 4, "group_size": group, **options}}, rest]


SIX_BITS = [f"*{name}_proj*" for name in ("q", "k", "v", "o", "down")]
TABLES = ["*lm_head*", "*embed*"]


def mixed_widths(key: str, **options: Any) -> list[Any]:
    """6 bits for attention and the products behind the gate, 4 for the others, 8 for tables; groups of 64."""
    options = {"group_size": 64, **options}
    return [
        {key: {"bits": 6, "include": SIX_BITS, **options}},
        {key: {"bits": 4, "exclude": [*SIX_BITS, *TABLES], **options}},
        {"quantize-weights": {"bits": 8, "group_size": 64, "only_remaining": True}},
    ]


def both(bits: tuple[int, int], *before: Any, **activations: Any) -> list[Any]:
    """Weights and activations of ``bits``: per row at 8 and 6 bits, in groups of 64 at 4."""
    weight_bits, activation_bits = bits
    group = 64 if weight_bits < 6 else 0
    return [
        *before,
        {"quantize-weights": {"bits": weight_bits, "group_size": group, "only_remaining": True}},
        {"quantize-activations": {"bits": activation_bits, "mode": "dynamic", **activations}},
    ]


WEIGHTS: dict[str, Case] = {
    "w8a16": ("w8a16", None),
    "w4 g64, round to nearest": (rtn(4, 64), None),
    "w4 g64, gptq on documentation": (gptq(64), DOCUMENTATION),
    "w4 g128, round to nearest": (rtn(4, 128), None),
    "w4 g128, gptq on documentation": (gptq(128), DOCUMENTATION),
    "w4 g64, gptq on the model's own text": (gptq(64), "self"),
    "w4 g64, gptq on both": (gptq(64), "both"),
    "w4 g32, gptq on both": (gptq(32), "both"),
    "w4 and w6 g64, gptq on both": (mixed_widths("gptq"), "both"),
    "w8a8": ("w8a8", None),
    "w8a8-smooth on documentation": ("w8a8-smooth", DOCUMENTATION),
    "w4 g64, round to nearest, range search": (rtn(4, 64, search=True), None),
    "w4 g64, awq on documentation": ("w4a16-awq", DOCUMENTATION),
    "w4 g64, awq and gptq on documentation": ("w4a16-awq-gptq", DOCUMENTATION),
    "w4 g64, gptq without shrinkage on documentation": (gptq(64, shrinkage=0.0), DOCUMENTATION),
}


def activation_cases() -> dict[str, Case]:
    """W8A8, W6A6 and W4A8 by every method of the family, then 4-bit weights on the same model."""
    found: dict[str, Case] = {}
    for name, bits in (("w8a8", (8, 8)), ("w6a6", (6, 6)), ("w4a8", (4, 8))):
        dynamic = {"bits": bits[0], "group_size": 64 if bits[0] < 6 else 0, "activation_bits": bits[1]}
        dynamic = {**dynamic, "symmetric": bits[0] == 8}
        smooth = {"smooth-activations": {"alpha": "search", **dynamic}}
        suppress = {"suppress-outliers": {**dynamic, "activation_mode": "dynamic"}}
        found[f"{name}, plain"] = (both(bits), None)
        found[f"{name}, SmoothQuant"] = (both(bits, smooth), DOCUMENTATION)
        found[f"{name}, OS+"] = (both(bits, suppress), DOCUMENTATION)
        found[f"{name}, RPTQ (static clusters)"] = (
            both(bits, "reorder-channels", mode="cluster"),
            DOCUMENTATION,
        )
        split = {"bits": bits[1], "threshold": 3.0, "group_size": 64}
        found[f"{name}, LLM.int8(), threshold 3"] = (
            [*rtn(bits[0], dynamic["group_size"]), {"split-outlier-features": split}]
            if bits[0] != bits[1]
            else [{"split-outlier-features": split}, *rtn_rest(bits[0])],
            None,
        )
        if bits == (8, 8):
            found["w8a8-mixed"] = ("w8a8-mixed", DOCUMENTATION)
            found["w8a8, static, plain"] = (both(bits, mode="static"), DOCUMENTATION)
            found["w8a8, static, OS+"] = (both(bits, "suppress-outliers", mode="static"), DOCUMENTATION)
            found["w8a8-outliers (static OS+, some inputs dynamic or 16 bits)"] = (
                "w8a8-outliers",
                DOCUMENTATION,
            )
            found["w8a8-reorder (RPTQ, worst inputs at 16 bits)"] = ("w8a8-reorder", DOCUMENTATION)
            paper = [{"split-outlier-features": {"threshold": 6.0}}, *rtn_rest(8)]
            found["w8a8, LLM.int8(), threshold 6, per row"] = (paper, None)
            found["w8a8, 16 outlier columns"] = ("w8a8-outlier-columns", DOCUMENTATION)
            found["fp8"] = ("fp8", None)
            found["fp8, static"] = ("fp8-static", DOCUMENTATION)
            found["w8a8, ZeroQuant"] = ("w8a8-zeroquant", DOCUMENTATION)
        if bits == (6, 6):
            distil = {"layer-distill": {"bits": 6, "activation_bits": 6, "group_size": 64}}
            found["w6a6, ZeroQuant"] = ([distil, *rtn_rest(6)], DOCUMENTATION)
        if bits == (4, 8):
            found["w4a8, ZeroQuant"] = ("w4a8-zeroquant", DOCUMENTATION)
            narrow = {"quantize-activations": {"format": "fp8-e4m3", "mode": "dynamic"}}
            found["w4a8, FP8 activations"] = ([*rtn(4, 64), narrow], None)
    found["w4a16, round to nearest"] = (rtn(4, 64), None)
    found["w4a16, AWQ"] = ("w4a16-awq", DOCUMENTATION)
    found["w4a16, GPTQ"] = ("w4a16-gptq", DOCUMENTATION)
    found["w4a16, AWQ and GPTQ"] = ("w4a16-awq-gptq", DOCUMENTATION)
    return found


def structured_cases() -> dict[str, Case]:
    """Fewer block parameters by every method, as they are and with what reads the cut units refitted.

    Channels of feed-forward layers compete within each layer, FLAP's over all layers; heads stay, of which
    the model has too few to choose from. Blocks are removed to the nearest number of whole blocks.
    """
    found: dict[str, Case] = {}
    methods = {
        "magnitude": {"importance": "l1"},
        "Wanda": {"importance": "wanda"},
        "Taylor": {"importance": "taylor"},
        "FLAP": {"importance": "flap", "max_amount": 0.9},
    }
    for percent in (10, 20, 30):
        budget = {"amount": percent / 100, "target": "block-parameters"}
        for method, options in methods.items():
            for recover in (False, True):
                cut = {"prune-channels": {**budget, **options, "recover": recover}}
                label = f"{method}{', refitted' if recover else ''}, {percent} %"
                found[label] = ([cut], DOCUMENTATION)
        for criterion in ("perplexity", "taylor", "angular"):
            ends = {"protect_first": 4, "protect_last": 2} if criterion == "taylor" else {}
            drop = {"remove-blocks": {"amount": percent / 100, "criterion": criterion, **ends}}
            found[f"blocks by {criterion}, {percent} %"] = ([drop], DOCUMENTATION)
    four_bit = gptq(64, {"prune-channels": {"amount": 0.2, "target": "block-parameters", **FLAP}})
    found["FLAP, refitted, 20 %, then 4-bit GPTQ"] = (four_bit, DOCUMENTATION)
    eight_bit = both((8, 8), {"prune-channels": {"amount": 0.2, "target": "block-parameters", **FLAP}})
    found["FLAP, refitted, 20 %, then w8a8"] = (eight_bit, DOCUMENTATION)
    return found


FLAP = {"importance": "flap", "max_amount": 0.9, "recover": True}


def sparsity_cases() -> dict[str, Case]:
    """Half of the weights zero, in three patterns, by every method; then with codes."""
    found: dict[str, Case] = {}
    for name, options in (
        ("50 %", {"sparsity": 0.5}),
        ("4:8", {"pattern": "4:8"}),
        ("2:4", {"pattern": "2:4"}),
    ):
        found[f"{name}, magnitude"] = ([{"prune-magnitude": options}], None)
        for method in ("wanda", "sparsegpt"):
            found[f"{name}, {method}"] = ([{method: options}], DOCUMENTATION)
            found[f"{name}, {method} and DSnoT"] = ([{method: options}, "dsnot"], DOCUMENTATION)
        if name == "50 %":
            found["50 %, magnitude, one threshold"] = (
                [{"prune-magnitude": {**options, "scope": "global"}}],
                None,
            )
            for measure in ("owl", "samsp"):
                for method in ("wanda", "sparsegpt"):
                    recipe = [{"allocate-sparsity": {"method": measure}}, {method: options}]
                    found[f"50 %, {measure} and {method}"] = (recipe, DOCUMENTATION)
        else:
            shuffled = {"permute-channels": {**options, "metric": "entropy", "gather": True}}
            found[f"{name}, e-sparse, not shuffled"] = ([{"e-sparse": options}], DOCUMENTATION)
            found[f"{name}, e-sparse"] = ([shuffled, {"e-sparse": options}], DOCUMENTATION)
            permuted = {"permute-channels": options}
            found[f"{name}, permuted where it folds, wanda"] = ([permuted, {"wanda": options}], DOCUMENTATION)
    found["sparse-2of4"] = ("sparse-2of4", DOCUMENTATION)
    found["sparse-2of4-w8a8"] = ("sparse-2of4-w8a8", DOCUMENTATION)
    found["sparse50-w4a16-gptq"] = ("sparse50-w4a16-gptq", DOCUMENTATION)
    joint = [{"sparsegpt": {"sparsity": 0.5, "bits": 4}}, *rtn_rest(4), "pack-sparse"]
    found["50 % and int4 in one sweep"] = (joint, DOCUMENTATION)
    return found


def low_rank_cases() -> dict[str, Case]:
    """Every method at 10 to 40 % fewer numbers, then factors with few bits, then residuals of rounding."""
    found: dict[str, Case] = {}
    methods = {
        "SVD": ({"svd": {}}, None),
        "FWSVD": ({"fwsvd": {}}, DOCUMENTATION),
        "ASVD": ({"asvd": {}}, DOCUMENTATION),
        "SVD-LLM": ({"svd-llm": {}}, DOCUMENTATION),
        "SVD-LLM, ranks by allocation": ({"svd-llm": {"budget": "global"}}, DOCUMENTATION),
    }
    for reduction in (10, 20, 30, 40):
        for name, (method, source) in methods.items():
            ((key, options),) = method.items()
            found[f"-{reduction} %, {name}"] = ([{key: {"keep": 1 - reduction / 100, **options}}], source)
    both = {"svd-llm": {"keep": 0.8, "budget": "global"}}
    found["-20 %, SVD-LLM, ranks by allocation, on both texts"] = ([both], "both")
    shrunk = {"svd-llm": {"keep": 0.8, "budget": "global", "shrinkage": 0.1}}
    found["-20 %, SVD-LLM, ranks by allocation, on both texts, shrunk"] = ([shrunk], "both")
    split = {"svd-llm": {"keep": 0.8}}
    found["-20 %, SVD-LLM, then 8 bits"] = ([split, *rtn(8, 0)], DOCUMENTATION)
    found["-20 %, SVD-LLM, then 4 bits, gptq"] = (gptq(64, split), DOCUMENTATION)
    found["LPLR, 8-bit factors, half the bits of bfloat16"] = ([{"lplr": {"keep": 0.25}}, *rtn_rest(8)], None)
    for rank in (16, 32, 64):
        residual = {"low-rank-residual": {"rank": rank, "bits": 8}}
        found[f"w4 g64, gptq, residual of rank {rank} (EoRA)"] = ([*gptq(64), residual], DOCUMENTATION)
    for bits in (3, 2):
        plain = [{"quantize-weights": {"bits": bits, "group_size": 64, "only_remaining": True}}]
        solved = [{"gptq": {"bits": bits, "group_size": 64}}, *plain]
        eora = {"low-rank-residual": {"rank": 32, "bits": 8}}
        loftq = {"low-rank-residual": {"rank": 32, "bits": 8, "metric": "weights", "iterations": 5}}
        found[f"w{bits} g64, gptq"] = (solved, DOCUMENTATION)
        found[f"w{bits} g64, gptq, residual of rank 32 (EoRA)"] = ([*solved, eora], DOCUMENTATION)
        found[f"w{bits} g64, round to nearest, residual of rank 32 (LoftQ)"] = ([*plain, loftq], None)
    return found


SUITES: dict[str, dict[str, Case]] = {
    "quality": WEIGHTS,
    "activations": activation_cases(),
    "structured": structured_cases(),
    "sparsity": sparsity_cases(),
    "low-rank": low_rank_cases(),
}
