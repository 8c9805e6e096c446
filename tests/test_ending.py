"""What a run says when a signal ends it: where it can go on from, if anywhere."""

from __future__ import annotations

import signal

import pytest

from opd_lightning.ending import Ending
from tests.callbacks import toy


@pytest.mark.parametrize(
    ("left", "words"), [(lambda: "at step 3", "ends at once, at step 3\n"), (None, "ends at once\n")]
)
def test_words_of_a_run_that_is_ended_at_once(capfd, left, words):
    ending = Ending(waits=False, left=left)
    with pytest.raises(SystemExit):
        ending._receive(signal.SIGTERM, None)
    ending.over()
    assert capfd.readouterr().err == f"\nSIGTERM: {words}"


def test_without_a_checkpoint_none_is_promised(tmp_path):
    words = []

    class Noticed(toy.Moves):
        def training_step(self, batch, batch_idx):
            words.append(self.trainer.checkpoint_callback._ending._left())
            return super().training_step(batch, batch_idx)

    toy.fit(toy.make_module(setting=Noticed), tmp_path, steps=2)
    assert words[0].startswith("before there is a checkpoint")
    assert words[1] == "at the last checkpoint"
