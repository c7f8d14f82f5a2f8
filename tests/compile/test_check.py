"""What the headers must agree with: names, shapes, dtypes; one diagnostic for each rule and kind of problem."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckptc.diagnostics import Diagnostic

from .test_expand import HEAD, Headers, compiled, marked, problems

BLOCK = """\
tensors:
  t: { from: «embed», as: mlp embed }
blocks:
  b:
    source: l.{{ layer }}
    scanned: [{ at: b/layers, stack: { layer: layers } }]
    unscanned: [{ at: "b/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      a: { from: up.weight, as: (heads head_dim) embed -> embed heads head_dim }
"""
PLAIN = BLOCK.replace("«", "").replace("»", "")
AT_EMBED = marked(HEAD + BLOCK)[1]
AT_UP = marked(HEAD + PLAIN.replace("up.weight", "«up.weight»"))[1]
GOOD: Headers = {"embed": ("bfloat16", (5, 2)), **{f"l.{n}.up.weight": ("bfloat16", (6, 2)) for n in range(4)}}
LAYOUTS = ["scanned", "unscanned"]


def changed(change: Mapping[str, tuple[str, tuple[int, ...]] | None]) -> Headers:
    """The good headers with tensors replaced, or taken out."""
    return {name: entry for name, entry in {**GOOD, **change}.items() if entry is not None}


def only(code: str, headers: Headers, layout: str = "scanned") -> Diagnostic:
    found = [d for d in problems(PLAIN, headers, layout=layout) if d.code == code]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_that_agree_are_accepted(layout: str) -> None:
    assert len(compiled(PLAIN, GOOD, layout=layout).tensors) == 5


def test_without_a_checkpoint_nothing_is_checked() -> None:
    assert len(compiled(PLAIN).tensors) == 5


def test_a_missing_tensor_is_reported_at_from_with_the_nearest_name() -> None:
    found = only("missing-tensor", changed({"embed": None, "embd": ("bfloat16", (5, 2))}))
    assert found.span == AT_EMBED
    assert found.message == "the checkpoint has no tensor `embed`"
    assert found.notes == ("rule: t",)
    assert found.help == "the nearest name is `embd`"


def test_the_nearest_name_has_the_layer_of_the_missing_one() -> None:
    near = {f"l.{n}.upp.weight": ("bfloat16", (6, 2)) for n in range(4)}
    found = only("missing-tensor", changed({"l.2.up.weight": None, **near}))
    assert (found.span, found.message) == (AT_UP, "the checkpoint has no tensor `l.2.up.weight`")
    assert found.help in ("the nearest name is `l.2.upp.weight`", "the nearest name is `l.0.up.weight`")


def test_the_nearest_name_is_one_that_exists() -> None:
    near = {f"l.{n}.ip.weight": ("bfloat16", (6, 2)) for n in (0, 3)}
    gone = {f"l.{n}.up.weight": None for n in range(4)}
    found = only("missing-tensor", {**changed(gone), **near})
    assert found.help == "the nearest name is `l.0.ip.weight`"


def test_names_that_are_like_nothing_hint_at_another_family() -> None:
    found = problems(PLAIN, {"zz": ("bfloat16", (5, 2))})
    assert {d.help for d in found if d.code == "missing-tensor"} == {"is this a checkpoint of another family?"}


def test_all_missing_layers_of_a_rule_are_one_problem() -> None:
    gone = {f"l.{n}.up.weight": None for n in (1, 2, 3)}
    found = only("missing-tensor", changed(gone))
    assert found.message.startswith("the checkpoint has no tensor `l.1.up.weight` (nor 2 others")


@pytest.mark.parametrize("shape", [(2, 5), (5,), (5, 2, 1), (10,), ()])
def test_a_wrong_shape_shows_the_expected_axes_and_what_was_found(shape: tuple[int, ...]) -> None:
    found = only("shape-mismatch", changed({"embed": ("bfloat16", shape)}))
    assert found.span == AT_EMBED
    assert found.message == "`embed` has another shape than the rule expects"
    assert found.notes == ("expected: [mlp=5, embed=2]", f"found:    {list(shape)}", "rule: t")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_shape_of_one_layer_names_the_layer(layout: str) -> None:
    found = only("shape-mismatch", changed({"l.2.up.weight": ("bfloat16", (6, 3))}), layout)
    assert (found.span, found.message) == (AT_UP, "`l.2.up.weight` has another shape than the rule expects")
    assert found.notes[:2] == ("expected: [(heads head_dim)=6, embed=2]", "found:    [6, 3]")


def test_a_shape_that_is_wrong_in_every_layer_is_one_problem() -> None:
    found = only("shape-mismatch", changed({f"l.{n}.up.weight": ("bfloat16", (2, 6)) for n in range(4)}))
    assert found.message.startswith("`l.0.up.weight` has another shape than the rule expects (4 tensors)")


def test_stacked_tensors_have_one_dtype() -> None:
    found = only("dtype-mismatch", changed({"l.3.up.weight": ("float32", (6, 2))}))
    assert (found.span, found.message) == (AT_UP, "`l.3.up.weight` has another dtype than the rule's other tensors")
    assert found.notes == ("expected: bfloat16", "found:    float32", "rule: b: a")


def test_arrays_of_their_own_may_differ_in_dtype() -> None:
    headers = changed({"l.3.up.weight": ("float32", (6, 2)), "embed": ("float16", (5, 2))})
    assert len(compiled(PLAIN, headers, layout="unscanned").arrays) == 5


def test_a_missing_tensor_does_not_hide_the_shapes_of_the_others() -> None:
    change = {"l.0.up.weight": None, "l.1.up.weight": ("bfloat16", (9, 9)), "l.2.up.weight": ("float32", (6, 2))}
    codes = [d.code for d in problems(PLAIN, changed(change))]
    assert codes == ["missing-tensor", "shape-mismatch", "dtype-mismatch"]


def test_all_rules_are_reported_together() -> None:
    change = {"embed": ("bfloat16", (4, 4)), **{f"l.{n}.up.weight": ("bfloat16", (6, 3)) for n in range(4)}}
    found = problems(PLAIN, changed(change))
    assert [(d.code, d.span) for d in found] == [("shape-mismatch", AT_UP), ("shape-mismatch", AT_EMBED)]


# -- scales --------------------------------------------------------------------------------------------------

QUANTISED = """\
tensors:
  a: { from: x.weight, as: mlp embed }
config: { quantization_config: { weight_block_size: [2, 2] } }
"""
QUANTISED_GOOD: Headers = {"x.weight": ("float8_e4m3fn", (5, 2)), "x.scale": ("float32", (3, 1))}


def test_scales_that_agree_are_accepted_and_read() -> None:
    assert [t.name for t in compiled(QUANTISED, QUANTISED_GOOD).tensors] == ["x.weight", "x.scale"]


def test_scales_have_the_shape_of_the_blocks() -> None:
    (found,) = problems(QUANTISED, {**QUANTISED_GOOD, "x.scale": ("float32", (2, 1))})
    assert (found.code, found.message) == ("shape-mismatch", "`x.scale` has another shape than the rule expects")
    assert found.notes[:2] == ("expected: [3, 1]", "found:    [2, 1]")


def test_the_shape_of_the_values_is_checked_as_stored() -> None:
    found = problems(QUANTISED, {**QUANTISED_GOOD, "x.weight": ("float8_e4m3fn", (2, 5))})
    assert (found[0].code, found[0].notes[1]) == ("shape-mismatch", "found:    [2, 5]")
