"""An encoder that works only when it is let: one token, one picture. Time is what the test says it is."""

import threading

from serve.encoder import OnnxEncoder
from tests.toy_encoder import write_toy_encoder


class GatedEncoder:
    def __init__(self, folder, tokens=0):
        self.ungated = OnnxEncoder(write_toy_encoder(folder)[0])
        self.manifest = self.ungated.manifest
        self.encoder_id = self.manifest.encoder_id
        self._tokens = threading.Semaphore(tokens)
        self.batches = []
        self.done = 0

    def embed(self, images):
        self.batches.append(len(images))
        for _ in images:
            self._tokens.acquire()
            self.done += 1
        return self.ungated.embed(images)

    def let(self, pictures):
        self._tokens.release(pictures)
