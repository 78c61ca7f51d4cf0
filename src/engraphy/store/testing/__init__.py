"""The tests that every store has to pass, for stores of your own. Needs pytest.

In a test module, derive from `WritableStoreTests` or `ReadOnlyStoreTests` and make your store:

    from engraphy.store.testing import WritableStoreTests

    class TestMyStore(WritableStoreTests):
        def make_store(self, rows_NR, folder):
            store = MyStore(*rows_NR.shape)
            store.scatter(np.arange(len(rows_NR)), rows_NR)
            return store

pytest finds the inherited tests. Set `mapped` or `updatable` if the store gives its memory, and
`forks = False` if it cannot be used in a forked child. For failures that show values, call
`pytest.register_assert_rewrite("engraphy.store.testing")` in conftest.py.
"""

from .reading import Filled, ReadOnlyStoreTests, StoreTests
from .tools import (
    check_changed,
    check_parts,
    in_children,
    in_threads,
    random_ids,
    random_rows,
    write_rows,
)
from .writing import WritableStoreTests

__all__ = [
    "Filled",
    "ReadOnlyStoreTests",
    "StoreTests",
    "WritableStoreTests",
    "check_changed",
    "check_parts",
    "in_children",
    "in_threads",
    "random_ids",
    "random_rows",
    "write_rows",
]
