from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

@final
class Engine:
    """Compile scripts and hold what they may use.

    Every limit must be above zero. `timeout_s` is wall-clock time, read once in 32 operations. `max_expr_depth` is the
    nesting allowed outside and inside of functions. A list or dict that Python passes in and that is larger than a
    script may make comes in as a frozen list or record; frozen records are never measured.

    `prelude` is Rhai source whose functions every script has, also as methods: `fn least(){ this.min_by("load") }`.
    A script may replace one. They count for no limit of the script and are not in `Script.functions()`.

    `print` receives the text of the script's `print(...)`, `debug` the text and the line of `debug(...)`. Without a
    callable the symbol is a ParseError.

    Raises ValueError for a limit out of range, and what `compile` raises if the prelude is at fault.
    """

    def __new__(
        cls,
        *,
        max_operations: int = 50_000,
        max_call_levels: int = 16,
        max_expr_depth: tuple[int, int] = (64, 32),
        max_variables: int = 64,
        max_functions: int = 32,
        max_string_bytes: int = 65_536,
        max_array_items: int = 1024,
        max_map_items: int = 256,
        max_source_bytes: int = 65_536,
        max_memory_bytes: int = 33_554_432,
        timeout_s: float = 0.02,
        strict_variables: bool = True,
        prelude: str | None = None,
        print: Callable[[str], object] | None = None,
        debug: Callable[[str, int | None], object] | None = None,
    ) -> Engine: ...
    def compile(self, source: str, *, name: str | None = None) -> Script:
        """Parse a script; `name` is what errors call the source.

        Raises ParseError, or LimitError for a source that is too large, too deep or has too many functions.
        """

    def register(self, name: str, callable: Callable[..., object]) -> None:
        """Make a Python callable a function of every script compiled from here on.

        It takes positional arguments, as many as its signature says; `x.name(y)` calls it with `x` and `y`. An
        exception ends the script, which cannot catch it, and is the `__cause__` of a ScriptRuntimeError.

        Raises TypeError if it is not callable, ValueError if the name is not an identifier.
        """

    @staticmethod
    def freeze(records: Sequence[Mapping[str, Any]]) -> Frozen:
        """Convert a sequence of mappings once; the same as `rhai.freeze`."""

@final
class Script:
    """A compiled source. Any number of threads may call it at once."""

    @property
    def name(self) -> str | None: ...
    def call(self, name: str, *args: object) -> Any:
        """Call a function without holding the GIL, and return its result as a Python value.

        Raises MissingFunctionError, ConversionError, IntegerRangeError, LimitError, ScriptRuntimeError or
        InternalError.
        """

    def trace(self, name: str, *args: object) -> tuple[Any, list[int]]:
        """Call a function and also return the lines that ran, in order, without repeats in a row.

        Slower than `call`, which it does not slow down. An error carries the lines in its `trace`. Of a trace over
        10,000 lines the older part is dropped.
        """

    def functions(self) -> list[Function]:
        """Return the functions that the script itself defines, in the order of their lines."""

@final
class Function:
    """A function that a script defines; `line` is where its body starts, counted from 1."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> list[str]: ...
    @property
    def line(self) -> int: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Frozen:
    """An immutable sequence of records that scripts share without conversion."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def __iter__(self) -> Iterator[Record]: ...
    def __contains__(self, record: object, /) -> bool: ...

@final
class Record(Mapping[str, Any]):
    """One record of a frozen sequence. Two are equal if they are the same record of the same sequence."""

    @property
    def index(self) -> int:
        """Place in the sequence that was frozen."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...

def freeze(records: Sequence[Mapping[str, Any]]) -> Frozen:
    """Convert a sequence of mappings once, so that passing it to a script costs nothing.

    A `Record` among them is shared instead of converted, so freezing again what changed little is cheap: at the place
    that it had it stays equal to itself, at another one it is a copy that knows its new place.

    In a script it is a list of records: properties read as `w.name`, nested mappings are records, nested sequences are
    lists. A missing property is an error, or `()` in an engine with `strict_variables=False`.

    Raises ConversionError for what a script cannot hold, IntegerRangeError for an int beyond 64 bits.
    """
