"""What a command is told to open: encoders and galleries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from tyro.conf import arg

from serve.errors import ContractError

if TYPE_CHECKING:
    from serve.classify import Head
    from serve.encoder import Encoder
    from serve.gallery import Gallery


GalleryName: TypeAlias = Annotated[str, arg(metavar="GALLERY")]
"""Not a Path, which would turn milvus://host into the folder milvus:/host."""
IdentityName: TypeAlias = Annotated[str, arg(metavar="NAME")]


def open_encoder(spec: str) -> Encoder:
    """A RUN folder in torch, anything else as `serve.encoder.open_encoder` has it."""
    from serve.encoder import open_encoder as open_served

    if is_run(spec):
        from train.torch_encoder import open_run

        return open_run(Path(spec))
    if (Path(spec) / "config.json").is_file():
        raise ContractError(f"{spec}: this run has not written its encoder yet; finish it with simclr pretrain ... --resume")
    return open_served(spec)


def is_run(spec: str) -> bool:
    """Whether it is a RUN folder with its encoder."""
    return (Path(spec) / "encoder.json").is_file()


def open_encoder_of(spec: str, head: Head) -> Encoder:
    """The encoder, with the plain features of a RUN where the head is a layer on these."""
    encoder = open_encoder(spec)
    if is_run(spec) and head.encoder_id != encoder.encoder_id:
        from train.torch_encoder import open_run, plain_id

        if head.encoder_id == plain_id(encoder.manifest):
            return open_run(Path(spec), unit=False)
    return encoder


def open_gallery(folder: str, spec: str | None, *, create: bool = False) -> Gallery:
    """A gallery with its encoder: the one named, or else the one it was last filled with."""
    from serve.gallery import Gallery

    if spec is None:
        with Gallery.open(folder) as gallery:
            spec = gallery.encoder_spec
        if spec is None:
            raise ContractError(f"{folder}: does not know where its encoder is; give --encoder ENC")
    gallery = Gallery.open(folder, open_encoder(spec), create=create)
    if create:
        gallery.encoder_spec = absolute(spec)
    return gallery


def absolute(spec: str) -> str:
    """An encoder that is found from any folder."""
    return spec if "://" in spec else str(Path(spec).absolute())
