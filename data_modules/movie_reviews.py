"""Movie reviews: 10,605 sentences rated by people, small enough to come with a package.

The ratings of Hutto and Gilbert (ICWSM 2014), mean of 20 raters from -4 to 4, are in the source
package of vaderSentiment, so that a first run needs nothing but the package index.
"""

import pathlib
import tarfile
from typing import Any

from app.utils.errors import InputError
from app.utils.package_index import fetch_package_file
from data_modules.readers import archive_content, file_content, tsv_rows
from data_modules.rows import TextRow
from data_modules.sampling import split_off
from data_modules.text import TextDataModule

ARCHIVE_URL = (
    "pypi://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    "#sha256=5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
MEMBER = "movieReviewSnippets_GroundTruth.txt"
COLUMNS = ("id", "rating", "sentence")
SETTING = f"--data.path (hutto_ICWSM_2014.tar.gz or {MEMBER} of it)"
MAX_TEXT_BYTES = 16 * 2**20  # the real file has 1.4 MB
NEUTRAL_RATING = 0.5  # sentences rated between -0.5 and 0.5 have no clear side and are dropped


class MovieReviewsDataModule(TextDataModule):
    """Classify sentences of movie reviews as positive or negative.

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
        """Read the rated sentences and split them."""
        rest, test = split_off(self._rated(), self.test_size, "data.test_size")
        train, validation = split_off(rest, self.validation_size or 0, "data.validation_size")
        return {"train": train, "validation": validation, "test": test}

    def _rated(self) -> list[TextRow]:
        """Make a row of each clearly rated sentence, once; count the others."""
        file = fetch_package_file(ARCHIVE_URL) if self.path is None else pathlib.Path(self.path)
        rows: dict[str, TextRow] = {}
        self.dropped_rows = {"neutral": 0, "repeated": 0}
        if file.is_file() and tarfile.is_tarfile(file):
            content = archive_content(file, [MEMBER], SETTING, MAX_TEXT_BYTES)[MEMBER]
        else:
            content = file_content(file, SETTING)
        for where, row in tsv_rows(content, str(file), SETTING, COLUMNS):
            sentence = row["sentence"].strip()
            try:
                rating = float(row["rating"])
            except ValueError:
                raise InputError(
                    f"{where} has the rating {row['rating']!r}: expected a number; change {SETTING}"
                ) from None
            if abs(rating) <= NEUTRAL_RATING:
                self.dropped_rows["neutral"] += 1
            elif sentence in rows:
                self.dropped_rows["repeated"] += 1
            else:
                target = int(rating > 0)
                prompt = f"classify the sentiment of the text: {sentence}\nresult: "
                rows[sentence] = TextRow(prompt, self.label_words[target], target)
        return list(rows.values())
