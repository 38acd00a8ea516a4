"""One bad image never hurts a neighbour, in this process."""

import resource

import numpy as np
import pytest

from serve.encoder import embed_each
from serve.preprocess import ImageError
from tests.bad_images import accepted, good, refused


@pytest.mark.parametrize("jpeg", ["full", "reduced"])
def test_in_a_batch_of_good_ones_each_gets_its_own_answer(toy_encoder, monkeypatch, jpeg):
    frame = toy_encoder.manifest.preprocess.model_copy(update={"jpeg": jpeg})
    monkeypatch.setattr(toy_encoder, "manifest", toy_encoder.manifest.model_copy(update={"preprocess": frame}))
    bad, unusual = refused(), accepted()
    batch = [good(0)]
    for number, data in enumerate([*bad.values(), *unusual.values()], start=1):
        batch += [data, good(number)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = embed_each(toy_encoder, batch)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    wanted = toy_encoder.embed([good(number) for number in range(len(bad) + len(unusual) + 1)])
    np.testing.assert_allclose(answers[::2], wanted, rtol=0, atol=1e-6)  # a row's last bit depends on its place in the batch
    for name, answer in zip([*bad, *unusual], answers[1::2], strict=True):
        if name in bad:
            assert isinstance(answer, ImageError), name
            assert "\n" not in str(answer)
        else:
            assert np.linalg.norm(answer) == pytest.approx(1, abs=1e-5), name
    assert grown_mb < 300


def test_nothing_but_bad_ones_and_nothing_at_all(toy_encoder):
    assert embed_each(toy_encoder, []) == []
    assert [type(answer) for answer in embed_each(toy_encoder, [b"", b"junk"])] == [ImageError, ImageError]
