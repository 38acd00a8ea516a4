"""Everything a user can get wrong or a machine can refuse, as one tree.

SimclrError                 one line for a person: what, got, wanted, do
├── SourceError             images, CSVs or archives that cannot be used
├── ContractError           a manifest, run, head or repository that is missing, damaged or does not fit
│   └── EncoderMismatch     vectors of two encoders would be mixed
├── EncoderUnavailable      the model server does not answer
├── TritonStartError        a Triton server cannot be started here
├── GalleryError            a gallery, or a request to it, that cannot be used
│   ├── NoSuchItem          it has no item of this id
│   ├── DamagedItem         what the disk holds of an item is not what was written
│   └── Reembedded          it has got another encoder since it was opened
├── TrainingError           pretraining, evaluation or the fit of a head cannot go on
└── ExportError             the exported graph is not what was trained; nothing is published

`serve.preprocess.ImageError` (one picture that cannot be read) stands outside the tree: that file travels alone to
Triton. The command line prints all of these, and OSError, as one line and exits with 1.
"""


class SimclrError(Exception):
    """Base of all errors whose message is meant for the user."""


class SourceError(SimclrError):
    """Images, CSVs or archives that cannot be used."""


class ContractError(SimclrError):
    """A manifest, run, head or repository that is missing, damaged or does not fit."""


class EncoderMismatch(ContractError):
    """Vectors of two encoders would be mixed."""


class EncoderUnavailable(SimclrError):
    """The model server does not answer in time."""


class TritonStartError(SimclrError):
    """A Triton server cannot be started on this machine."""


class GalleryError(SimclrError):
    """A gallery, or a request to it, that cannot be used."""


class NoSuchItem(GalleryError):
    """A gallery has no item of this id."""


class DamagedItem(GalleryError):
    """What the disk holds of an item is not what was written."""


class Reembedded(GalleryError):
    """The gallery has got another encoder since it was opened."""


class TrainingError(SimclrError):
    """Pretraining, evaluation or the fit of a head cannot go on."""


class ExportError(SimclrError):
    """The exported graph is not what was trained."""


def first_line(error: BaseException) -> str:
    """What a foreign exception says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
