//! The Python faces of frozen records.

use crate::convert;
use crate::record::{List, Record};
use pyo3::exceptions::{PyIndexError, PyKeyError};
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};

/// Convert a sequence of mappings once, so that passing it to a script costs nothing.
#[pyfunction]
pub fn freeze(records: &Bound<'_, PyAny>) -> PyResult<Frozen> {
    convert::to_records(records).map(Frozen)
}

/// An immutable sequence of records.
#[pyclass(frozen, module = "rhai", sequence)]
pub struct Frozen(pub List);

#[pymethods]
impl Frozen {
    fn __len__(&self) -> usize {
        self.0 .0.len()
    }

    fn __getitem__(&self, index: isize) -> PyResult<PyRecord> {
        let len = self.0 .0.len();
        let place = if index < 0 { len.checked_add_signed(index) } else { Some(index.unsigned_abs()) };
        place
            .and_then(|i| self.0 .0.get(i))
            .and_then(|item| item.read_lock::<Record>().map(|record| PyRecord(record.clone())))
            .ok_or_else(|| PyIndexError::new_err(format!("index {index} is out of range of {len} records")))
    }

    fn __repr__(&self) -> String {
        format!("<rhai.Frozen of {} records>", self.0 .0.len())
    }
}

/// One record of a frozen sequence: which one it is (`index`), and a mapping of its properties.
#[pyclass(frozen, module = "rhai", name = "Record", mapping)]
pub struct PyRecord(pub Record);

#[pymethods]
impl PyRecord {
    /// Place in the sequence that was frozen.
    #[getter]
    fn index(&self) -> usize {
        self.0.index().unwrap_or(usize::MAX)
    }

    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<Py<PyAny>> {
        match self.0.get(name) {
            Some(value) => convert::to_python(py, value),
            None => Err(PyKeyError::new_err(name.to_owned())),
        }
    }

    #[pyo3(signature = (key, default=None, /))]
    fn get(&self, py: Python<'_>, key: &str, default: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        match self.0.get(key) {
            Some(value) => convert::to_python(py, value),
            None => Ok(default.unwrap_or_else(|| py.None())),
        }
    }

    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        view(slf, "KeysView")
    }

    fn values<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        view(slf, "ValuesView")
    }

    fn items<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        view(slf, "ItemsView")
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.0.names().iter().map(|name| name.as_str()))?.try_iter()
    }

    fn __len__(&self) -> usize {
        self.0.names().len()
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> bool {
        name.extract::<String>().is_ok_and(|name| self.0.get(&name).is_some())
    }

    /// Two records are equal if they are the same record of the same frozen sequence.
    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| self.0.is_same(&other.get().0))
    }

    fn __hash__(&self) -> usize {
        self.0.identity()
    }

    fn __repr__(&self) -> String {
        format!("<rhai.Record {} {}>", self.index(), self.0)
    }
}

/// What a Python mapping answers to `keys`, `values` and `items`.
fn view<'py>(record: &Bound<'py, PyRecord>, class: &str) -> PyResult<Bound<'py, PyAny>> {
    record.py().import("collections.abc")?.getattr(class)?.call1((record,))
}
