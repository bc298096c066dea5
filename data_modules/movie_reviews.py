"""Movie reviews: 10,605 sentences rated by people, small enough to come with a package.

The ratings of Hutto and Gilbert (ICWSM 2014), mean of 20 raters from -4 to 4, are in the source
package of vaderSentiment, so that a first run needs nothing but the package index.
"""

import pathlib
import tarfile
from typing import Any

from app.utils.errors import InputError
from app.utils.package_index import fetch_package_file
from data_modules.encoding import TextRow
from data_modules.sampling import split_off
from data_modules.text import TextDataModule

ARCHIVE_URL = (
    "pypi://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    "#sha256=5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
MEMBER = "movieReviewSnippets_GroundTruth.txt"
MAX_TEXT_BYTES = 16 * 2**20  # the real file has 1.4 MB
NEUTRAL_RATING = 0.5  # sentences rated between -0.5 and 0.5 have no clear side and are dropped


class MovieReviewsDataModule(TextDataModule):
    """Tell positive from negative sentences of movie reviews.

    Test rows, validation rows and training rows are disjoint and always the same. A sentence that
    occurs twice is used once.

    Args:
        path: The published hutto_ICWSM_2014.tar.gz, or movieReviewSnippets_GroundTruth.txt of it;
            null fetches the archive from the package index, once.
        validation_size: Rows held out for validation.
        test_size: Rows held out for the test.
        **options: See `TextDataModule`.
    """

    task_name = "movie_reviews"
    label_words = ("negative", "positive")

    def __init__(
        self,
        path: str | None = None,
        validation_size: int = 300,
        test_size: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(path=path, validation_size=validation_size, **options)
        self.test_size = test_size
        self.source = path or ARCHIVE_URL

    def load(self) -> dict[str, list[TextRow]]:
        """Read the rated sentences and split them.

        Raises:
            InputError: The file is missing or has another form, or the sizes leave no row to train.
        """
        file = fetch_package_file(ARCHIVE_URL) if self.path is None else pathlib.Path(self.path)
        rows = self._parse(_read_text(file), file)
        rest, test = split_off(rows, self.test_size, "data.test_size")
        assert self.validation_size is not None
        train, validation = split_off(rest, self.validation_size, "data.validation_size")
        return {"train": train, "validation": validation, "test": test}

    def _parse(self, text: str, file: pathlib.Path) -> list[TextRow]:
        """Make a row of each clearly rated sentence, once; count the others."""
        rows: dict[str, TextRow] = {}
        dropped = {"neutral": 0, "repeated": 0}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                _, rating_text, sentence = line.strip().split("\t")
                rating = float(rating_text)
            except ValueError:
                raise InputError(
                    f"line {number} of {file} is {line[:60]!r}: expected an id, a rating and a "
                    "sentence, with tabs between; change --data.path"
                ) from None
            if abs(rating) <= NEUTRAL_RATING:
                dropped["neutral"] += 1
            elif sentence in rows:
                dropped["repeated"] += 1
            else:
                target = int(rating > 0)
                prompt = f"classify the sentiment of the text: {sentence}\nresult: "
                rows[sentence] = TextRow(prompt, self.label_words[target], target)
        self.dropped_rows = dropped
        return list(rows.values())


def _read_text(file: pathlib.Path) -> str:
    """Return the ratings' text from the archive or from the file itself."""
    wanted = f"expected hutto_ICWSM_2014.tar.gz or {MEMBER}; change --data.path"
    try:
        with file.open("rb") as stream:
            if tarfile.is_tarfile(stream):
                content = _read_member(stream, file, wanted)
            else:
                content = stream.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise InputError(f"{file} holds more than {MAX_TEXT_BYTES} bytes of text: {wanted}")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} ({error}): {wanted}") from error


def _read_member(stream: Any, file: pathlib.Path, wanted: str) -> bytes:
    """Return the bytes of the one member that is needed; nothing is unpacked to disk."""
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and pathlib.PurePosixPath(member.name).name == MEMBER:
                return content.read(MAX_TEXT_BYTES + 1)
    raise InputError(f"{file} has no member {MEMBER}: {wanted}")
