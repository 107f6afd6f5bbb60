"""Table of the blobs a broker retains."""

from sqlmodel import Field, SQLModel


class RetainedBlob(SQLModel, table=True):
    """A manifest or chunk the broker holds: written before it is sent, confirmed when the broker has it."""

    __tablename__ = "retained_blob"
    digest: str = Field(primary_key=True, max_length=64)
    size_bytes: int
    confirmed: bool = False
