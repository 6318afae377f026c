"""Buckets: grids, the choice of a bucket, and the one crop of an image."""

import math

import numpy as np
import pytest
from PIL import Image

from data.features.buckets import (
    DEFAULT_BUCKETS,
    Bucket,
    Crop,
    fit_image,
    nearest_bucket,
    parse_buckets,
    plan_crop,
)

# Width, height; latent height and width; input width and height, rows and columns of patches of 14;
# rows and columns of patches of 16.
TABLE = [
    (1024, 1024, (128, 128), (1022, 1022), (73, 73), (64, 64)),
    (1216, 832, (104, 152), (1218, 826), (59, 87), (52, 76)),
    (1280, 768, (96, 160), (1274, 770), (55, 91), (48, 80)),
    (1344, 704, (88, 168), (1344, 700), (50, 96), (44, 84)),
]
TINY = parse_buckets("128x128,160x96,96x160")


@pytest.mark.parametrize(("width", "height", "latent", "input_14", "grid_14", "grid_16"), TABLE)
def test_latents_and_grids_of_the_default_buckets(
    width, height, latent, input_14, grid_14, grid_16
):
    for flip in (1, -1):
        bucket = Bucket(*(width, height)[::flip])
        assert bucket in DEFAULT_BUCKETS
        assert bucket.latent_size(8) == latent[::flip]
        assert (bucket.grid(14)[1] * 14, bucket.grid(14)[0] * 14) == input_14[::flip]
        assert bucket.grid(14) == grid_14[::flip]
        assert bucket.grid(16) == grid_16[::flip]
        assert (bucket.grid(16)[1] * 16, bucket.grid(16)[0] * 16) == bucket.size


def test_there_are_seven_default_buckets_of_about_a_megapixel():
    assert len(set(DEFAULT_BUCKETS)) == 7
    assert all(abs(b.width * b.height / 2**20 - 1) < 0.1 for b in DEFAULT_BUCKETS)
    assert parse_buckets(",".join(b.name for b in DEFAULT_BUCKETS)) == DEFAULT_BUCKETS


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "got ''"),
        ("128", "got '128'"),
        ("128x128,", "got ''"),
        ("128x-96", "got '128x-96'"),
        ("128x100", "got 128x100"),
        ("0x16", "got 0x16"),
        ("16x32768", "got 16x32768"),
        ("128x96,96x128,128X96", "names 128x96 twice"),
    ],
)
def test_what_are_no_buckets_is_one_sentence(text, part):
    with pytest.raises(ValueError, match=r"^--buckets: .*accepted: different sizes") as error:
        parse_buckets(text)
    assert part in str(error.value)


def test_an_image_gets_the_bucket_of_the_nearest_logarithmic_shape():
    sizes = np.random.default_rng(0).integers(64, 4096, (300, 2)).tolist()
    for width, height in sizes:
        found = nearest_bucket(width, height, DEFAULT_BUCKETS)
        mismatch = [
            abs(math.log(width / height) - math.log(b.width / b.height)) for b in DEFAULT_BUCKETS
        ]
        assert found == DEFAULT_BUCKETS[mismatch.index(min(mismatch))]


def test_a_transposed_image_gets_the_transposed_bucket_also_where_two_are_as_near():
    # 9:16 is as far from 3:4 as it is from 27:64.
    buckets = parse_buckets("384x512,512x384,432x1024,1024x432")
    for width, height in [(900, 1600), (1600, 900), (100, 99), (1000, 3), (123, 456)]:
        found = nearest_bucket(width, height, buckets)
        turned = nearest_bucket(height, width, buckets[::-1])
        assert (turned.height, turned.width) == found.size
    assert nearest_bucket(900, 1600, buckets) == Bucket(384, 512)  # Though the other is larger.
    assert nearest_bucket(50, 50, buckets) == nearest_bucket(50, 50, buckets[::-1])


def test_of_two_buckets_of_one_shape_the_larger_counts_that_enlarges_nothing():
    buckets = parse_buckets("64x64,128x128,256x256")
    assert nearest_bucket(200, 210, buckets) == Bucket(128, 128)
    assert nearest_bucket(500, 500, buckets) == Bucket(256, 256)
    assert nearest_bucket(40, 40, buckets) == Bucket(64, 64)


def test_a_crop_is_the_middle_of_the_whole_image_resized():
    # Columns count from 0 to 255, so that pixels tell where they come from.
    image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    fitted, crop = fit_image(image, Bucket(32, 32))
    assert fitted.mode == "RGB"
    assert fitted.size == (32, 32)
    assert crop == Crop((256, 64), (128, 32), 48, 0, (32, 32))
    assert crop.box == (96, 0, 160, 64)
    row = np.asarray(fitted)[16, :, 0]
    np.testing.assert_allclose(row, np.arange(96, 160, 2) + 0.5, atol=1)


def test_sides_are_rounded_upwards_so_that_no_border_is_invented():
    for size in [(333, 500), (1001, 667), (97, 161), (4000, 129)]:
        for bucket in TINY:
            crop = plan_crop(*size, bucket)
            scale = max(bucket.width / size[0], bucket.height / size[1])
            assert crop.resized == tuple(math.ceil(round(side * scale, 9)) for side in size)
            left, top, right, bottom = crop.box
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert fit_image(Image.new("L", size), bucket)[0].size == bucket.size


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    fitted, crop = fit_image(Image.fromarray(pixels), Bucket(160, 96))
    np.testing.assert_array_equal(np.asarray(fitted), pixels)
    assert crop.to_dict() == dict(resized=[160, 96], offset=[0, 0], box=[0, 0, 160, 96])


def test_images_are_enlarged_to_twice_their_size_at_most():
    assert plan_crop(64, 64, Bucket(128, 128)).resized == (128, 128)
    for size in [(63, 64), (64, 63)]:
        with pytest.raises(ValueError, match="would be enlarged more than 2 times"):
            plan_crop(*size, Bucket(128, 128))
