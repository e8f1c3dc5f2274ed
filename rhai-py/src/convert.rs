//! Values across the border, both ways.

use crate::errors::{conversion_error, integer_range_error};
use crate::frozen::{Frozen, PyRecord};
use crate::record::{List, Record, Shape};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use rhai::{Array, Dynamic, Engine, ImmutableString, Map, INT};
use std::collections::HashMap;
use std::sync::Arc;

/// Containers may nest this deep, in either direction.
const MAX_DEPTH: usize = 64;

/// One step of the way to a value.
#[derive(Clone, Copy)]
enum Step<'a> {
    Argument(usize),
    Name(&'a str),
    Index(usize),
    Key(&'a str),
}

/// Where a value stands inside an argument; written out only for messages: `argument 1['gpus'][3]`.
struct Place<'a> {
    step: Step<'a>,
    parent: Option<&'a Place<'a>>,
    container: usize,
    depth: usize,
}

impl<'a> Place<'a> {
    fn root(step: Step<'a>) -> Self {
        Self { step, parent: None, container: 0, depth: 0 }
    }

    fn path(&self) -> String {
        let before = self.parent.map(Place::path).unwrap_or_default();
        match self.step {
            Step::Argument(i) => format!("{before}argument {}", i + 1),
            Step::Name(name) => format!("{before}{name}"),
            Step::Index(i) => format!("{before}[{i}]"),
            Step::Key(key) => format!("{before}[{key:?}]"),
        }
    }

    /// Go into a container; refuses a container that holds itself, and nesting that is too deep.
    fn enter<'b>(&'b self, container: &Bound<'_, PyAny>, step: Step<'b>) -> PyResult<Place<'b>> {
        let address = container.as_ptr() as usize;
        let mut above = Some(self);
        while let Some(place) = above {
            if place.container == address {
                return Err(conversion_error(container.py(), &format!("{} contains itself", self.path())));
            }
            above = place.parent;
        }
        if self.depth >= MAX_DEPTH {
            let message = format!("{} nests deeper than {MAX_DEPTH} levels", self.outermost().path());
            return Err(conversion_error(container.py(), &message));
        }
        Ok(Place { step, parent: Some(self), container: address, depth: self.depth + 1 })
    }

    fn outermost(&self) -> &Self {
        self.parent.map_or(self, Place::outermost)
    }
}

/// Convert the arguments of a call.
pub fn arguments(engine: &Engine, args: &Bound<'_, PyTuple>) -> PyResult<Vec<Dynamic>> {
    let mut thaw = Thaw::new(engine);
    args.iter().enumerate().map(|(i, arg)| thaw.value(&arg, &Place::root(Step::Argument(i)))).collect()
}

/// Convert one Python value; `name` says in an error message what it is.
pub fn to_rhai(engine: &Engine, value: &Bound<'_, PyAny>, name: &str) -> PyResult<Dynamic> {
    Thaw::new(engine).value(value, &Place::root(Step::Name(name)))
}

/// Convert a sequence of mappings to a list of records. A record that is frozen already is shared, not converted.
pub fn to_records(records: &Bound<'_, PyAny>) -> PyResult<List> {
    let root = Place::root(Step::Name("records"));
    let mut freezer = Freezer::default();
    let mut items = Vec::new();
    for (index, record) in records.try_iter()?.enumerate() {
        let record = record?;
        if let Ok(known) = record.cast::<PyRecord>() {
            items.push(Dynamic::from(known.get().0.at(index)));
            continue;
        }
        let place = root.enter(records, Step::Index(index))?;
        let Some(pairs) = mapping_items(&record)? else {
            let message = format!("{} is a {}, not a mapping", place.path(), type_name(&record));
            return Err(conversion_error(record.py(), &message));
        };
        let record = freezer.record(Some(index), &record, pairs, &place)?;
        items.push(Dynamic::from(record));
    }
    Ok(items.into())
}

/// What the two ways of taking in a value have in common; they differ in what becomes of containers.
trait Intake {
    fn sequence(&mut self, items: Vec<Dynamic>) -> Dynamic;
    fn mapping(&mut self, pairs: Vec<(ImmutableString, Dynamic)>) -> Dynamic;

    fn value(&mut self, value: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Dynamic> {
        if let Some(scalar) = scalar(value, place)? {
            return Ok(scalar);
        }
        if let Ok(record) = value.cast::<PyRecord>() {
            return Ok(Dynamic::from(record.get().0.clone()));
        }
        if let Ok(frozen) = value.cast::<Frozen>() {
            return Ok(Dynamic::from(frozen.get().0.clone()));
        }
        if value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>() {
            let mut items = Vec::with_capacity(value.len()?);
            for (i, item) in value.try_iter()?.enumerate() {
                let here = place.enter(value, Step::Index(i))?;
                items.push(self.value(&item?, &here)?);
            }
            return Ok(self.sequence(items));
        }
        if let Some(pairs) = mapping_items(value)? {
            let pairs = self.pairs(value, pairs, place)?;
            return Ok(self.mapping(pairs));
        }
        let message = format!(
            "{} is a {}; give str, int, float, bool, None, list, tuple, dict or frozen records",
            place.path(),
            type_name(value)
        );
        Err(conversion_error(value.py(), &message))
    }

    fn pairs(
        &mut self,
        owner: &Bound<'_, PyAny>,
        pairs: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        place: &Place<'_>,
    ) -> PyResult<Vec<(ImmutableString, Dynamic)>> {
        let mut converted = Vec::with_capacity(pairs.len());
        for (key, item) in pairs {
            let Ok(text) = key.cast::<PyString>() else {
                let message = format!("{} has a {} as a key; give str", place.path(), type_name(&key));
                return Err(conversion_error(owner.py(), &message));
            };
            let text = text.to_cow().map_err(|_| not_unicode(owner.py(), place))?;
            let here = place.enter(owner, Step::Key(&text))?;
            converted.push((ImmutableString::from(&*text), self.value(&item, &here)?));
        }
        Ok(converted)
    }
}

/// Takes values in as Rhai arrays and maps, which scripts may change: every call converts them again. What is larger
/// than a script may make comes in frozen, since Rhai measures a container each time that a method touches it.
struct Thaw {
    max_array_items: usize,
    max_map_items: usize,
    large: Freezer,
}

impl Thaw {
    fn new(engine: &Engine) -> Self {
        Self {
            max_array_items: engine.max_array_size(),
            max_map_items: engine.max_map_size(),
            large: Freezer::default(),
        }
    }
}

impl Intake for Thaw {
    fn sequence(&mut self, items: Vec<Dynamic>) -> Dynamic {
        if items.len() > self.max_array_items {
            return self.large.sequence(items);
        }
        Dynamic::from_array(items)
    }

    fn mapping(&mut self, pairs: Vec<(ImmutableString, Dynamic)>) -> Dynamic {
        if pairs.len() > self.max_map_items {
            return self.large.mapping(pairs);
        }
        let map: Map = pairs.into_iter().map(|(k, v)| (k.into(), v)).collect();
        Dynamic::from_map(map)
    }
}

/// Takes values in as records and lists, which are shared; equal shapes are made once.
#[derive(Default)]
struct Freezer {
    shapes: HashMap<Vec<String>, Arc<Shape>>,
}

impl Freezer {
    fn record(
        &mut self,
        index: Option<usize>,
        owner: &Bound<'_, PyAny>,
        pairs: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        place: &Place<'_>,
    ) -> PyResult<Record> {
        let pairs = self.pairs(owner, pairs, place)?;
        Ok(self.shaped(index, pairs))
    }

    fn shaped(&mut self, index: Option<usize>, mut pairs: Vec<(ImmutableString, Dynamic)>) -> Record {
        pairs.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
        // Distinct str subclass instances may compare unequal in Python and still carry the same text.
        pairs.dedup_by(|a, b| a.0 == b.0);
        let key: Vec<String> = pairs.iter().map(|(name, _)| name.to_string()).collect();
        let (names, values) = pairs.into_iter().unzip();
        let shape = self.shapes.entry(key).or_insert_with(|| Arc::new(Shape::new(names)));
        Record::new(index, shape.clone(), values)
    }
}

impl Intake for Freezer {
    fn sequence(&mut self, items: Vec<Dynamic>) -> Dynamic {
        Dynamic::from(List::from(items))
    }

    fn mapping(&mut self, pairs: Vec<(ImmutableString, Dynamic)>) -> Dynamic {
        Dynamic::from(self.shaped(None, pairs))
    }
}

fn scalar(value: &Bound<'_, PyAny>, place: &Place<'_>) -> PyResult<Option<Dynamic>> {
    if value.is_none() {
        return Ok(Some(Dynamic::UNIT));
    }
    if let Ok(text) = value.cast::<PyString>() {
        let text = text.to_cow().map_err(|_| not_unicode(value.py(), place))?;
        return Ok(Some(ImmutableString::from(&*text).into()));
    }
    // bool is a subclass of int, so it comes first.
    if let Ok(flag) = value.cast::<PyBool>() {
        return Ok(Some(flag.is_true().into()));
    }
    if value.is_instance_of::<PyInt>() {
        let number: INT = value.extract().map_err(|_| {
            let message = format!("{} does not fit in a 64-bit signed integer", place.path());
            integer_range_error(value.py(), &message)
        })?;
        return Ok(Some(number.into()));
    }
    if let Ok(number) = value.cast::<PyFloat>() {
        return Ok(Some(number.value().into()));
    }
    Ok(None)
}

type Pairs<'py> = Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>;

fn mapping_items<'py>(value: &Bound<'py, PyAny>) -> PyResult<Option<Pairs<'py>>> {
    if let Ok(dict) = value.cast::<PyDict>() {
        return Ok(Some(dict.iter().collect()));
    }
    let Ok(mapping) = value.cast::<PyMapping>() else {
        return Ok(None);
    };
    mapping.items()?.iter().map(|pair| pair.extract()).collect::<PyResult<_>>().map(Some)
}

fn not_unicode(py: Python<'_>, place: &Place<'_>) -> PyErr {
    conversion_error(py, &format!("{} holds a lone surrogate, which is not valid Unicode", place.path()))
}

fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "value".to_owned(), |name| name.to_string())
}

/// The type of the first part of a value that has no Python form, if there is one. Nesting too deep counts as such.
pub fn unportable(value: &Dynamic) -> Option<String> {
    unportable_below(value, 0)
}

fn unportable_below(value: &Dynamic, depth: usize) -> Option<String> {
    if depth > MAX_DEPTH {
        return Some(format!("value of more than {MAX_DEPTH} levels"));
    }
    if let Some(array) = value.read_lock::<Array>() {
        return array.iter().find_map(|item| unportable_below(item, depth + 1));
    }
    if let Some(map) = value.read_lock::<Map>() {
        return map.values().find_map(|item| unportable_below(item, depth + 1));
    }
    let known = value.is_unit()
        || value.is_bool()
        || value.is_int()
        || value.is_float()
        || value.is_string()
        || value.is_char()
        // What is in these came from Python.
        || value.is::<Record>()
        || value.is::<List>();
    (!known).then(|| if value.is_fnptr() { "closure".to_owned() } else { value.type_name().to_owned() })
}

/// Convert a Rhai value to Python.
///
/// Raises ConversionError for what `unportable` names.
pub fn to_python(py: Python<'_>, value: &Dynamic) -> PyResult<Py<PyAny>> {
    if let Some(found) = unportable(value) {
        return Err(conversion_error(py, &format!("a {found} has no Python form")));
    }
    give_out(py, value)
}

fn give_out(py: Python<'_>, value: &Dynamic) -> PyResult<Py<PyAny>> {
    if value.is_unit() {
        return Ok(py.None());
    }
    if let Some(record) = value.read_lock::<Record>() {
        return give_out_record(py, &record);
    }
    if let Some(list) = value.read_lock::<List>() {
        return give_out_items(py, &list.0);
    }
    if let Some(array) = value.read_lock::<Array>() {
        return give_out_items(py, &array);
    }
    if let Some(map) = value.read_lock::<Map>() {
        return give_out_dict(py, map.iter().map(|(name, item)| (name.as_str(), item)));
    }
    give_out_scalar(py, value)
}

fn give_out_scalar(py: Python<'_>, value: &Dynamic) -> PyResult<Py<PyAny>> {
    if let Ok(flag) = value.as_bool() {
        return Ok(PyBool::new(py, flag).to_owned().into_any().unbind());
    }
    if let Ok(number) = value.as_int() {
        return Ok(number.into_pyobject(py)?.into_any().unbind());
    }
    if let Ok(number) = value.as_float() {
        return Ok(PyFloat::new(py, number).into_any().unbind());
    }
    Ok(PyString::new(py, &value.to_string()).into_any().unbind())
}

/// A record of a frozen list goes out as itself, so that the caller sees which one it is; a nested one as a dict.
fn give_out_record(py: Python<'_>, record: &Record) -> PyResult<Py<PyAny>> {
    if record.index().is_some() {
        return Ok(Py::new(py, PyRecord(record.clone()))?.into_any());
    }
    give_out_dict(py, record.iter().map(|(name, item)| (name.as_str(), item)))
}

fn give_out_items(py: Python<'_>, items: &[Dynamic]) -> PyResult<Py<PyAny>> {
    let list = PyList::empty(py);
    for item in items {
        list.append(give_out(py, item)?)?;
    }
    Ok(list.into_any().unbind())
}

fn give_out_dict<'a>(
    py: Python<'_>,
    pairs: impl Iterator<Item = (&'a str, &'a Dynamic)>,
) -> PyResult<Py<PyAny>> {
    let dict = PyDict::new(py);
    for (name, item) in pairs {
        dict.set_item(name, give_out(py, item)?)?;
    }
    Ok(dict.into_any().unbind())
}
