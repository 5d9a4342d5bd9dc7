"""Stop strings are found wherever the text is cut, and held back before they are whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_serve.text.stop_strings import StopStrings

few = st.text("ab", min_size=1, max_size=4)


def ends(text: str, stop: list[str]) -> tuple[int, int] | None:
    """The plain search: where the first match ends, and how long it is."""
    for end in range(1, len(text) + 1):
        matches = [len(s) for s in stop if text[:end].endswith(s)]
        if matches:
            return end, max(matches)
    return None


@given(st.text("abc", max_size=30), st.lists(few, max_size=4), st.lists(st.integers(1, 5)))
def test_agrees_with_the_plain_search_however_the_text_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    watch = StopStrings(stop)
    start, found = 0, None
    for size in [*cuts, *[1] * len(text)]:
        piece = text[start : start + size]
        match = watch.push(piece)
        if match is not None:
            found = (start + match.end, match.length)
            break
        start += len(piece)
        held = text[start - watch.num_held : start]
        assert not held or any(s.startswith(held) for s in stop)
        longest = max((len(s) for s in stop), default=0)
        after = [
            k
            for k in range(min(start, longest - 1), 0, -1)
            if any(s.startswith(text[start - k : start]) and len(s) > k for s in stop)
        ]
        assert watch.num_held == (after[0] if after else 0)
    assert found == ends(text, stop)


def test_unarmed_matches_are_passed_over_but_their_end_may_begin_another() -> None:
    watch = StopStrings(["aa"])
    assert watch.push("aa", is_armed=False) is None
    assert watch.num_held == 1
    match = watch.push("a")
    assert match is not None
    assert (match.end, match.length) == (1, 2)
