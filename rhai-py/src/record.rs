//! Records: mappings converted once, shared by every call, read through getters.

use rhai::{Dynamic, EvalAltResult, ImmutableString};
use std::fmt;
use std::sync::Arc;

/// How many property names an error message lists.
const NAMES_IN_MESSAGE: usize = 12;

/// The sorted property names that records of one shape share.
#[derive(Debug, PartialEq, Eq)]
pub struct Shape {
    names: Box<[ImmutableString]>,
}

impl Shape {
    /// Make a shape of names that are sorted and distinct.
    pub fn new(sorted_names: Vec<ImmutableString>) -> Self {
        Self { names: sorted_names.into() }
    }

    pub fn names(&self) -> &[ImmutableString] {
        &self.names
    }

    fn slot(&self, name: &str) -> Option<usize> {
        self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()
    }
}

#[derive(Debug)]
struct Fields {
    /// Place in the frozen list; None for a mapping nested inside a record.
    index: Option<usize>,
    shape: Arc<Shape>,
    values: Box<[Dynamic]>,
}

/// An immutable record; cloning it copies one pointer.
#[derive(Clone, Debug)]
pub struct Record(Arc<Fields>);

impl Record {
    /// How the message about a missing property starts.
    pub const MISSING: &str = "the record has no property";

    /// Make a record whose `values` stand in the order of the shape's names.
    pub fn new(index: Option<usize>, shape: Arc<Shape>, values: Vec<Dynamic>) -> Self {
        debug_assert_eq!(shape.names.len(), values.len());
        Self(Arc::new(Fields { index, shape, values: values.into() }))
    }

    pub fn index(&self) -> Option<usize> {
        self.0.index
    }

    /// This record at a place of a list: itself where that is its place, else a copy that has it.
    pub fn at(&self, index: usize) -> Self {
        if self.0.index == Some(index) {
            return self.clone();
        }
        Self(Arc::new(Fields {
            index: Some(index),
            shape: self.0.shape.clone(),
            values: self.0.values.clone(),
        }))
    }

    pub fn get(&self, name: &str) -> Option<&Dynamic> {
        self.0.shape.slot(name).map(|slot| &self.0.values[slot])
    }

    pub fn names(&self) -> &[ImmutableString] {
        self.0.shape.names()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ImmutableString, &Dynamic)> {
        self.names().iter().zip(&*self.0.values)
    }

    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// An address that is the same for every copy of this record.
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }

    /// Read a property; a missing one is an error if `strict`, else `()`.
    pub fn property(&self, name: &str, strict: bool) -> Result<Dynamic, Box<EvalAltResult>> {
        match self.get(name) {
            Some(value) => Ok(value.clone()),
            None if strict => Err(self.missing(name)),
            None => Ok(Dynamic::UNIT),
        }
    }

    #[cold]
    pub fn missing(&self, name: &str) -> Box<EvalAltResult> {
        let mut known: Vec<&str> = self.names().iter().map(|n| n.as_str()).collect();
        let more = known.len().saturating_sub(NAMES_IN_MESSAGE);
        known.truncate(NAMES_IN_MESSAGE);
        let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
        let message = format!("{} '{name}'; it has: {}{tail}", Self::MISSING, known.join(", "));
        EvalAltResult::ErrorPropertyNotFound(message, rhai::Position::NONE).into()
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("#{")?;
        for (i, (name, value)) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{name:?}: {value:?}")?;
        }
        f.write_str("}")
    }
}

/// An immutable list of values, most often records; cloning it copies one pointer.
#[derive(Clone, Debug, Default)]
pub struct List(pub Arc<Vec<Dynamic>>);

impl From<Vec<Dynamic>> for List {
    fn from(items: Vec<Dynamic>) -> Self {
        Self(Arc::new(items))
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, value) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{value:?}")?;
        }
        f.write_str("]")
    }
}

/// Iterates over a list without copying it first.
pub struct ListIter {
    items: Arc<Vec<Dynamic>>,
    next: usize,
}

impl Iterator for ListIter {
    type Item = Dynamic;

    fn next(&mut self) -> Option<Dynamic> {
        let item = self.items.get(self.next).cloned();
        self.next += 1;
        item
    }
}

impl IntoIterator for List {
    type Item = Dynamic;
    type IntoIter = ListIter;

    fn into_iter(self) -> ListIter {
        ListIter { items: self.0, next: 0 }
    }
}
