"""Validation on held-out images: what each test measures, absent networks, sizes and ranks."""

import dataclasses
import json

import helpers
import numpy as np
import pytest
import torch
from feature_fakes import (
    BUCKETS,
    CAPTIONS,
    FakeDataset,
    FakeGenerator,
    FakeLpips,
    FakeText,
    FakeVisual,
)

from evaluation.in_loop.features import compare, describe_row, last_row, seed_of_item
from evaluation.validation.config import TESTS, ValidationConfig
from evaluation.validation.trials import (
    FEATURE_TESTS,
    TEXT_GUIDANCE,
    VISUAL_GUIDANCE,
    Missing,
    choose_items,
    choose_other_texts,
    choose_pairs,
    spread,
)
from evaluation.validation.validate import validate
from evaluation.validation.word_edits import FALLBACK, edit_caption
from metrics.lpips import LPIPS
from metrics.rows import compare_rows
from training.telemetry import Telemetry

NETWORKS = dict(lpips=FakeLpips(), visual=FakeVisual(), text=FakeText())
ABSENT = Missing("there are no weights")


def run(generator=None, dataset=None, *, tests=TESTS, **changes):
    """Return rows and pictures by the name of the test."""
    networks = {name: changes.pop(name, own) for name, own in NETWORKS.items()}
    config = ValidationConfig(tests=tests, **changes)
    rows, pictures = validate(
        generator or FakeGenerator(), dataset or FakeDataset(), config=config, **networks
    )
    assert [row["metric"] for row in rows] == [f"validation_{name}" for name in tests]
    assert all(json.loads(json.dumps(row))["num"] == row["num"] for row in rows)
    return dict(zip(tests, rows, strict=True)), {
        name.removeprefix("validation_"): picture for name, picture in pictures.items()
    }


class TestTheTests:
    def test_a_model_of_the_reference_alone_reconstructs_and_takes_every_reference(self):
        rows, _ = run(FakeGenerator(ignores="text"))
        assert rows["reconstruction"]["value"] == 0
        assert rows["reconstruction"]["values"]["layout"] == pytest.approx(1, abs=1e-6)
        assert rows["reconstruction"]["values"]["share_excellent"] == 1
        assert rows["swap"]["value"] == 1
        assert rows["swap"]["values"]["lpips_reference"] == 0
        assert rows["text_edit"]["value"] == 0
        assert rows["text_edit"]["values"]["lpips"] == 0
        # Without a text that says anything, a text's own image is no nearer than another's.
        assert rows["text_only"]["values"]["share_matched_better"] == 0

    def test_a_model_of_the_text_alone_takes_no_reference_and_every_edit(self):
        rows, _ = run(FakeGenerator(ignores="visual"))
        assert rows["reconstruction"]["value"] > 0.05
        assert rows["swap"]["value"] == 0
        assert rows["text_edit"]["value"] == 1
        assert rows["text_edit"]["values"]["lpips_control"] == 0
        assert rows["text_only"]["values"]["share_matched_better"] == 1
        values = rows["text_only"]["values"]
        assert values["lpips"] < values["lpips_shuffled"]

    def test_guidance_by_either_condition_gives_images_as_far_apart_as_both_conditions(self):
        rows, pictures = run(tests=("divergence",))
        dataset, distances = FakeDataset(), []
        for (index,) in choose_items(dataset, 5):
            latents, cond = dataset.__getitems__([index])
            text = cond["text"].float().sum(1)[:, :, None, None].expand(latents.shape)
            distances.append(((text - latents.float()) / 255).abs().mean().item())
        assert rows["divergence"]["value"] == pytest.approx(np.mean(distances), abs=1e-3)
        share = np.mean(np.array(distances) > 0.1)
        assert rows["divergence"]["values"]["share_diverged"] == pytest.approx(share)
        assert set(pictures) == {"divergence"}

    def test_divergence_uses_the_scales_4_and_2_with_neither_condition_taken_away(self):
        generator = FakeGenerator()
        run(generator, tests=("divergence",), num_shown=1)
        guidances = [guidance for _, _, _, guidance in generator.calls]
        assert guidances.count(TEXT_GUIDANCE) == guidances.count(VISUAL_GUIDANCE) == 5
        assert guidances.count(None) == 1
        assert (TEXT_GUIDANCE.text_scale, TEXT_GUIDANCE.visual_scale) == (4, 0)
        assert (VISUAL_GUIDANCE.text_scale, VISUAL_GUIDANCE.visual_scale) == (0, 2)
        assert all({"text", "patches"} <= set(cond) for _, cond, _, _ in generator.calls)

    def test_reconstructions_are_summed_up_by_quantiles_and_shares_of_bands(self):
        class Known(FakeLpips):
            def __init__(self):
                self.left = [0.1, 0.2, 0.4, 0.6, 0.8, 0.3, 0.5, 0.7, 0.05, 0.9]

            def distance(self, a, b):
                return torch.tensor([self.left.pop(0)], dtype=torch.float64)

        rows, _ = run(lpips=Known(), tests=("reconstruction",), num_reconstructions=10)
        values, all_values = rows["reconstruction"]["values"], Known().left
        assert values["lpips"] == pytest.approx(np.mean(all_values))
        for percent in (10, 50, 90):
            expected = np.percentile(all_values, percent)
            assert values[f"lpips_p{percent}"] == pytest.approx(expected)
        shares = {name: values[f"share_{name}"] for name in ("excellent", "good", "blurry", "poor")}
        assert shares == dict(excellent=0.3, good=0.2, blurry=0.2, poor=0.3)
        assert [item["lpips"] for item in rows["reconstruction"]["per_item"]] == all_values

    def test_layout_is_the_cosine_place_by_place(self):
        class Shifted(FakeVisual):
            def encode(self, images):
                cls, patches = super().encode(images)
                return cls, patches.roll(1, dims=1)

        class Opposite(FakeVisual):
            def encode(self, images):
                cls, patches = super().encode(images)
                return cls, -patches

        class Scaled(FakeVisual):
            """Patches of other lengths and the same directions."""

            def encode(self, images):
                cls, patches = super().encode(images)
                return cls, patches * torch.arange(1, patches.shape[1] + 1)[:, None]

        found = {}
        for visual in (FakeVisual(), Shifted(), Opposite(), Scaled()):
            rows, _ = run(FakeGenerator(ignores="text"), visual=visual, tests=("reconstruction",))
            found[type(visual)] = rows["reconstruction"]["values"]["layout"]
        assert found[FakeVisual] == pytest.approx(1, abs=1e-6)
        assert found[Opposite] == pytest.approx(-1, abs=1e-6)
        assert found[Scaled] == pytest.approx(1, abs=1e-6)
        assert found[Shifted] < 0.99

    def test_noise_is_of_the_images_name_in_every_test(self):
        generator, dataset = FakeGenerator(noise=20), FakeDataset()
        run(generator)
        seeds = {seed_of_item(name) for name in dataset.ids}
        used = [seeds_of_call for seeds_of_call, *_ in generator.calls]
        assert {seed for (seed,) in used} <= seeds
        # An image and its edit differ by their texts alone.
        generator = FakeGenerator(noise=20)
        run(generator, tests=("text_edit",), num_edits=1)
        (first, own, _, _), (second, same, _, _), (third, edited, _, _) = generator.calls
        assert first == second == third
        assert torch.equal(own["text"], same["text"])
        assert not torch.equal(own["text"], edited["text"])
        assert torch.equal(own["patches"], edited["patches"])

    def test_reconstructions_have_all_conditions_and_the_models_own_guidance(self):
        generator = FakeGenerator()
        run(generator, tests=("reconstruction",), num_shown=1)
        (_, cond, _, guidance), *others = generator.calls
        assert set(cond) == {"text", "text_mask", "cls", "patches", "size"}
        assert guidance is None
        # One image is shown, also of its text alone.
        assert sum("cls" not in cond for _, cond, _, _ in others) == 1
        assert len(others) == 12

    def test_a_swap_of_equal_images_transfers_nothing(self):
        class Equal(FakeDataset):
            def __getitems__(self, indices):
                return super().__getitems__([0 for _ in indices])

        rows, _ = run(dataset=Equal((4,)), tests=("swap",))
        assert rows["swap"]["value"] == 0

    def test_images_of_a_text_alone_get_no_visual_condition(self):
        generator = FakeGenerator()
        # Each text meets that of an image of another size.
        run(generator, FakeDataset((1, 1, 1)), tests=("text_only",))
        assert all(set(cond) == {"text", "text_mask", "size"} for _, cond, _, _ in generator.calls)
        assert all(
            cond["size"].tolist() == list(bucket.size) for _, cond, bucket, _ in generator.calls
        )

    def test_another_encoder_than_the_datasets_is_noticed_by_the_control(self):
        class Other(FakeText):
            def encode(self, captions):
                hidden, mask, num = super().encode(captions)
                return 1.5 * hidden, mask, num

        rows, _ = run(text=Other(), tests=("text_edit",))
        assert rows["text_edit"]["values"]["lpips_control"] > 0.01
        assert any("is this the encoder" in text for text in rows["text_edit"]["warnings"])
        rows, _ = run(tests=("text_edit",))
        assert rows["text_edit"]["warnings"] == []

    def test_an_edit_that_shows_no_more_than_its_control_is_not_applied(self):
        class Blind(FakeText):
            """Encodes any text as another one: image and control differ as much as the edit."""

            def encode(self, captions):
                hidden, mask, num = super().encode(captions)
                hidden[:, 0] = torch.tensor([0.0, 200, 200])
                hidden[:, 1:] = 0
                return hidden, mask, num

        rows, _ = run(text=Blind(), tests=("text_edit",))
        assert rows["text_edit"]["values"]["lpips"] > 0.05
        assert rows["text_edit"]["value"] == 0


class TestWhatIsAbsent:
    def test_without_lpips_values_are_none_with_the_reason_and_never_zero(self):
        rows, pictures = run(lpips=ABSENT)
        for name, row in rows.items():
            assert row["value"] is None
            assert row["reason"] == ABSENT.reason
            present = {key for key, value in row["values"].items() if value is not None}
            is_layout = {key for key in row["values"] if key.startswith("layout")}
            assert present == is_layout
            assert set(row["missing"]) == set(row["values"]) - is_layout
            assert "absent: there are no weights" in describe_row(row)
            assert "lpips_hash" not in row
            assert name in pictures
        assert rows["reconstruction"]["num"] == 12
        # Elsewhere there is nothing to measure, and only what is shown is made.
        assert rows["text_only"]["num"] == 4

    def test_without_the_visual_encoder_only_the_layout_is_none(self):
        rows, _ = run(visual=ABSENT)
        values = rows["reconstruction"]["values"]
        assert {name for name, value in values.items() if value is None} == {
            name for name in values if name.startswith("layout")
        }
        assert rows["reconstruction"]["missing"]["layout"] == ABSENT.reason
        assert "reason" not in rows["reconstruction"]
        assert all("missing" not in rows[name] for name in TESTS if name != "reconstruction")

    def test_without_the_text_encoder_there_are_no_edits_and_the_others_go_on(self):
        generator = FakeGenerator()
        rows, pictures = run(generator, text=ABSENT)
        assert (rows["text_edit"]["value"], rows["text_edit"]["num"]) == (None, 0)
        assert rows["text_edit"]["reason"] == ABSENT.reason
        assert set(pictures) == set(TESTS) - {"text_edit"}
        assert all(rows[name]["value"] is not None for name in TESTS if name != "text_edit")

    def test_without_a_pair_of_one_size_or_of_texts_there_is_no_swap_or_no_comparison(self):
        rows, _ = run(dataset=FakeDataset((1, 1, 1), captions=("a red thing",)))
        assert rows["swap"]["value"] is None
        assert rows["swap"]["reason"] == "no size has two held-out images"
        assert rows["text_only"]["reason"] == "no two held-out images have different texts"
        assert rows["reconstruction"]["value"] is not None

    def test_sizes_of_one_image_are_left_out_of_the_swap_with_a_warning(self):
        rows, _ = run(dataset=FakeDataset((1, 3, 2)), tests=("swap",))
        assert rows["swap"]["buckets"] == {"64x64": 0, "96x48": 3, "48x96": 2}
        assert rows["swap"]["warnings"] == ["left out, with a single image: 64x64"]

    def test_without_held_out_images_every_value_is_none(self):
        rows, pictures = run(dataset=FakeDataset(()))
        for row in rows.values():
            assert row["value"] is None
            assert row["reason"] == "held-out has no images of the split validation"
            assert set(row["values"].values()) == {None}
        assert pictures == {}

    def test_rows_are_written_and_compared_all_the_same(self, tmp_path):
        from configs.presets import get_preset

        config = get_preset("nanodit-tiny").run
        telemetry = Telemetry(tmp_path, config.logging, config, 0)
        for lpips in (ABSENT, FakeLpips()):
            rows, _ = run(lpips=lpips, tests=("reconstruction", "swap"))
            for row in rows.values():
                telemetry.record_metric(dict(row, kimg=1.0), 1000)
        telemetry.close()
        lines = (tmp_path / "metric-validation_swap.jsonl").read_text().splitlines()
        assert [json.loads(line)["value"] for line in lines] == [None, rows["swap"]["value"]]
        rows = [dict(json.loads(line), source=str(i)) for i, line in enumerate(lines)]
        assert "null" in compare_rows(rows, anyway=True)


class TestWhichImages:
    def test_all_sizes_have_equal_parts_as_far_as_they_go(self):
        rows, _ = run(dataset=FakeDataset((50, 2, 9)), num_reconstructions=12)
        expected = {"64x64": 5, "96x48": 2, "48x96": 5}
        assert rows["reconstruction"]["buckets"] == expected
        assert rows["reconstruction"]["num"] == 12
        assert spread((50, 2, 9), 12) == [[5, 15, 25, 35, 45], [0, 1], [0, 2, 4, 6, 8]]

    def test_are_all_there_are_if_they_are_few_and_no_more(self):
        assert spread((3, 0, 2), 100) == [[0, 1, 2], [], [0, 1]]
        assert spread((), 5) == []

    def test_of_more_sizes_than_images_are_of_sizes_far_apart(self):
        assert spread((9,) * 7, 5) == [[4], [], [4], [4], [4], [], [4]]
        assert spread((9,) * 7, 1) == [[4], [], [], [], [], [], []]

    @pytest.mark.parametrize("num", range(1, 30))
    def test_are_different_and_as_many_as_asked_for(self, num):
        for counts in ((4, 1, 9, 3), (7, 7), (30,)):
            rows = spread(counts, num)
            if num >= len(counts):
                assert sum(map(len, rows)) == min(num, sum(counts))
            for own, count in zip(rows, counts, strict=True):
                assert len(set(own)) == len(own)
                assert all(0 <= row < count for row in own)

    def test_pairs_are_of_one_size_and_two_images(self):
        dataset = FakeDataset((5, 4, 1))
        pairs = choose_pairs(dataset, 5)
        assert len(pairs) == 5
        for first, second in pairs:
            assert first != second
            assert dataset.bucket_index(first) == dataset.bucket_index(second) < 2

    def test_other_texts_are_other_texts_of_the_same_size_where_there_are_any(self):
        dataset = FakeDataset((2, 4, 1), captions=("a red thing", "a red thing", "a blue thing"))
        pairs = dict(choose_other_texts(dataset, 20))
        assert set(pairs) == set(range(7))
        for first, second in pairs.items():
            assert dataset.caption(first) != dataset.caption(second)
        # The first two images have the same text.
        assert pairs[0] == pairs[1] == 2
        assert all(dataset.bucket_index(pairs[index]) == 1 for index in range(2, 6))

    def test_rows_tell_another_choice_of_images_by_a_hash(self):
        rows = [run(tests=("swap",), num_swaps=num)[0]["swap"] for num in (4, 4, 5)]
        assert rows[0]["items_hash"] == rows[1]["items_hash"] != rows[2]["items_hash"]


LINE = 15  # Height of the titles above a picture.


def tiles_of(picture):
    """Return the three images of 256x256 in the first row of a picture."""
    row = np.asarray(picture)[LINE + 2 : LINE + 258]
    row = row[:, row.shape[1] - 3 * 258 - 2 :]
    return [row[:, 2 + 258 * i : 258 + 258 * i] for i in range(3)]


class TestPictures:
    def test_have_a_row_of_three_for_each_image_shown_whatever_its_size(self):
        _, pictures = run(num_shown=3)
        for name in TESTS:
            # One image each of 64x64 (enlarged to 256), 96x48 (five times) and 48x96 (twice).
            width, height = pictures[name].size
            assert height == LINE + 256 + 240 + 192 + 4 * 2
            assert 3 * 480 + 4 * 2 < width < 3 * 480 + 4 * 2 + 180  # Texts are on the left.

    def test_show_truth_reconstruction_and_text_alone(self):
        dataset = FakeDataset((3,), captions=("a red thing",))
        _, pictures = run(
            FakeGenerator(ignores="text"), dataset, tests=("reconstruction",), num_shown=1
        )
        truth, made, alone = tiles_of(pictures["reconstruction"])
        assert np.array_equal(truth, made)
        assert truth.std() > 10
        assert (alone == 0).all()
        wanted = FakeGenerator().codec.pictures(dataset.__getitems__([0])[0])[0].permute(1, 2, 0)
        assert np.array_equal(truth[::4, ::4], wanted)

    def test_of_a_swap_show_both_images_around_what_was_made(self):
        _, pictures = run(FakeGenerator(ignores="text"), FakeDataset((3,)), tests=("swap",))
        first, made, second = tiles_of(pictures["swap"])
        assert np.array_equal(made, second)
        assert not np.array_equal(made, first)


class TestEdits:
    @pytest.mark.parametrize(
        ("caption", "expected", "replaced"),
        [
            (
                "A red car by a blue lake.",
                "A blue car by a red lake.",
                ["red -> blue", "blue -> red"],
            ),
            ("Red, red RED", "Blue, blue BLUE", ["red -> blue"]),
            ("Two dogs and a man", "Two cats and a woman", ["dogs -> cats", "man -> woman"]),
            ("An old pond.", "An young pond.", ["old -> young"]),
        ],
    )
    def test_replace_whole_words_of_the_first_kind_that_there_are(
        self, caption, expected, replaced
    ):
        assert edit_caption(caption) == (expected, replaced)
        assert edit_caption(expected)[0] == caption

    def test_of_a_text_without_known_words_come_before_it(self):
        edited, replaced = edit_caption("something")
        assert edited == FALLBACK + "something"
        assert replaced == ["+ At night, in blue light"]
        dataset = FakeDataset(captions=("something",))
        rows, _ = run(dataset=dataset, tests=("text_edit",))
        assert rows["text_edit"]["warnings"] == [
            "5 text(s) contain no word to replace, so words were put before them"
        ]
        assert rows["text_edit"]["value"] == 1  # It says "blue".


class TestAlarm:
    def row(self, median, **changes):
        return dict(metric="validation_reconstruction", values={"lpips_p50": median}, **changes)

    def test_is_raised_by_a_median_that_rises_by_more_than_a_quarter(self):
        assert compare(self.row(0.5), self.row(0.4)) is None
        assert compare(self.row(0.2), self.row(0.4)) is None
        message = compare(self.row(0.51), self.row(0.4))
        assert message == "the median LPIPS has risen by 27% from 0.400 to 0.510"
        assert "risen from 0.000 to 0.100" in compare(self.row(0.1), self.row(0.0))

    def test_is_not_raised_by_rows_that_tell_nothing(self):
        assert compare(self.row(0.9), None) is None
        assert compare(self.row(None), self.row(0.4)) is None
        assert compare(self.row(0.9), self.row(None)) is None
        assert compare(self.row(0.9, items_hash="a"), self.row(0.4, items_hash="b")) is None
        steps = [self.row(0.9, sampling=dict(steps=n, scales=(1, 2))) for n in (10, 20)]
        assert compare(*steps) is None

    def test_compares_with_the_last_row_that_can_be_read(self, tmp_path):
        assert last_row(tmp_path, "validation_reconstruction") is None
        path = tmp_path / "metric-validation_reconstruction.jsonl"
        first = self.row(0.3, sampling=dict(scales=(1, 2)))
        path.write_text(f"{json.dumps(first)}\n{json.dumps(self.row(0.9))[:20]}")
        last = last_row(tmp_path, "validation_reconstruction")
        assert last["values"] == first["values"]
        # A tuple is a list once it was written.
        assert compare(self.row(0.9, sampling=dict(scales=(1, 2))), last) is not None


def test_real_lpips_measures_images_of_every_size(tmp_path):
    lpips = LPIPS.load("alex", helpers.random_lpips(tmp_path))
    rows, _ = run(FakeGenerator(noise=10), lpips=lpips)
    assert all(np.isfinite(row["value"]) for row in rows.values())
    assert rows["reconstruction"]["value"] > 0
    assert rows["reconstruction"]["lpips_hash"] == lpips.hash


def test_every_test_has_a_number_and_a_value_among_its_measures():
    assert set(FEATURE_TESTS) == set(TESTS) == set(ValidationConfig().sizes)
    for test in FEATURE_TESTS.values():
        assert test.value in test.measures
    sizes = ValidationConfig(num_reconstructions=1, num_swaps=2, num_edits=3).sizes
    assert list(sizes.values()) == [1, 2, 3, 20, 5]
    assert dataclasses.replace(ValidationConfig(), num_text_only=7).sizes["text_only"] == 7
    with pytest.raises(ValueError, match="--lpips-weights: got 3 files"):
        ValidationConfig(lpips_weights=("a", "b", "c"))


RANKS_SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import numpy as np
import test_feature_validation as tests
from torch_utils import distributed

distributed.init()
rows, pictures = tests.run(tests.FakeGenerator(noise=20), num_shown=3)
assert bool(pictures) == distributed.is_main()
if distributed.is_main():
    arrays = {{name: np.asarray(picture) for name, picture in pictures.items()}}
    np.savez(sys.argv[1], rows=json.dumps(rows), **arrays)
try:
    tests.run(tests.FakeGenerator(), tests.FakeDataset((2, 1)), visual=tests.Failing())
except RuntimeError as error:
    assert str(error) == "one image failed"
else:
    raise AssertionError("a rank went on")
hashes = distributed.gather_objects(tests.LPIPS.load("alex", sys.argv[2:]).hash)
assert hashes[0] == hashes[1] == "{hash}"
distributed.shutdown()
"""


class Failing(FakeVisual):
    """Fails at the second image of the rank that sees two."""

    def __init__(self):
        self.left = 2

    def encode(self, images):
        self.left -= 1
        if not self.left:
            raise RuntimeError("one image failed")
        return super().encode(images)


def test_rows_and_pictures_do_not_depend_on_the_number_of_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    paths, files = [str(helpers.ROOT), str(helpers.ROOT / "tests")], helpers.random_lpips(tmp_path)
    script.write_text(RANKS_SCRIPT.format(paths=paths, hash=LPIPS.load("alex", files).hash))
    helpers.on_ranks(2, script, tmp_path / "two.npz", *files)
    rows, pictures = run(FakeGenerator(noise=20), num_shown=3)
    with np.load(tmp_path / "two.npz", allow_pickle=False) as found:
        two = json.loads(str(found["rows"]))
        for name in TESTS:
            assert np.array_equal(found[name], np.asarray(pictures[name]))
    one = json.loads(json.dumps(rows))
    for name in TESTS:
        for row in (one[name], two[name]):
            assert row.pop("seconds") >= 0
            del row["packages"]  # Those of the whole process.
        assert one[name] == two[name]
    assert len(set(BUCKETS)) == 3
    assert len(CAPTIONS) == 4
