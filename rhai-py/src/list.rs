//! What scripts can do with frozen lists and records; arrays get the functions that name a field.

use crate::invoke::{int, takes, Callable, PairCallable, RhaiResult};
use crate::record::{List, Record};
use rhai::plugin::*;
use rhai::{Array, EvalAltResult, FnPtr, Module, NativeCallContext, Position, Shared, INT};
use std::cmp::Ordering;
use std::sync::OnceLock;

type Fallible<T> = Result<T, Box<EvalAltResult>>;

/// The functions of lists and records, shared by every engine.
pub fn module() -> Shared<Module> {
    static MODULE: OnceLock<Shared<Module>> = OnceLock::new();
    let make = || {
        let mut module = Module::new();
        module.combine_flatten(exported_module!(lists));
        module.combine_flatten(exported_module!(arrays));
        module.combine_flatten(exported_module!(records));
        module.set_custom_type::<List>("list");
        module.set_custom_type::<Record>("record");
        module.set_iterable::<List>();
        module.build_index();
        module.into()
    };
    MODULE.get_or_init(make).clone()
}

#[export_module]
mod lists {
    #[rhai_fn(name = "len", get = "len", pure)]
    pub fn len(list: &mut List) -> INT {
        int(list.0.len())
    }
    #[rhai_fn(name = "is_empty", get = "is_empty", pure)]
    pub fn is_empty(list: &mut List) -> bool {
        list.0.is_empty()
    }
    #[rhai_fn(pure)]
    pub fn first(list: &mut List) -> Dynamic {
        list.0.first().cloned().unwrap_or_default()
    }
    #[rhai_fn(pure)]
    pub fn last(list: &mut List) -> Dynamic {
        list.0.last().cloned().unwrap_or_default()
    }
    #[rhai_fn(pure)]
    pub fn get(list: &mut List, index: INT) -> Dynamic {
        place(index, list.0.len()).map_or(Dynamic::UNIT, |i| list.0[i].clone())
    }
    #[rhai_fn(index_get, return_raw, pure)]
    pub fn index(list: &mut List, index: INT) -> RhaiResult {
        let len = list.0.len();
        let found = place(index, len).map(|i| list.0[i].clone());
        found.ok_or_else(|| EvalAltResult::ErrorArrayBounds(len, index, Position::NONE).into())
    }
    #[rhai_fn(pure)]
    pub fn extract(list: &mut List, start: INT, len: INT) -> List {
        let from = usize::try_from(start.max(0)).unwrap_or(usize::MAX);
        let count = usize::try_from(len.max(0)).unwrap_or(usize::MAX);
        list.0.iter().skip(from).take(count).cloned().collect::<Vec<_>>().into()
    }
    #[rhai_fn(pure)]
    pub fn to_array(list: &mut List) -> Array {
        list.0.to_vec()
    }
    #[rhai_fn(pure)]
    pub fn contains(list: &mut List, value: Dynamic) -> bool {
        list.0.iter().any(|item| same(item, &value))
    }
    #[rhai_fn(pure)]
    pub fn index_of(list: &mut List, value: Dynamic) -> INT {
        list.0.iter().position(|item| same(item, &value)).map_or(-1, int)
    }
    #[rhai_fn(return_raw, pure)]
    pub fn filter(ctx: NativeCallContext, list: &mut List, test: FnPtr) -> Fallible<List> {
        let mut test = Callable::new(&ctx, &test);
        let mut kept = Vec::new();
        for (i, item) in list.0.iter().enumerate() {
            if test.test(item, i)? {
                kept.push(item.clone());
            }
        }
        Ok(kept.into())
    }
    #[rhai_fn(return_raw, pure)]
    pub fn map(ctx: NativeCallContext, list: &mut List, change: FnPtr) -> Fallible<Array> {
        let mut change = Callable::new(&ctx, &change);
        let most = ctx.engine().max_array_size();
        let mut changed = Array::new();
        for (i, item) in list.0.iter().enumerate() {
            if most > 0 && changed.len() >= most {
                return Err(EvalAltResult::ErrorDataTooLarge("Size of array".into(), Position::NONE).into());
            }
            changed.push(change.call(item, i)?);
        }
        Ok(changed)
    }
    #[rhai_fn(return_raw, pure)]
    pub fn for_each(ctx: NativeCallContext, list: &mut List, action: FnPtr) -> Fallible<()> {
        let mut action = Callable::new(&ctx, &action);
        for (i, item) in list.0.iter().enumerate() {
            let _ = action.call(item, i)?;
        }
        Ok(())
    }
    #[rhai_fn(return_raw, pure)]
    pub fn find(ctx: NativeCallContext, list: &mut List, test: FnPtr) -> RhaiResult {
        let found = position(&ctx, list, &test, true)?;
        Ok(found.map_or(Dynamic::UNIT, |i| list.0[i].clone()))
    }
    #[rhai_fn(name = "index_of", return_raw, pure)]
    pub fn index_of_matching(ctx: NativeCallContext, list: &mut List, test: FnPtr) -> Fallible<INT> {
        Ok(position(&ctx, list, &test, true)?.map_or(-1, int))
    }
    #[rhai_fn(return_raw, pure)]
    pub fn some(ctx: NativeCallContext, list: &mut List, test: FnPtr) -> Fallible<bool> {
        Ok(position(&ctx, list, &test, true)?.is_some())
    }
    #[rhai_fn(return_raw, pure)]
    pub fn all(ctx: NativeCallContext, list: &mut List, test: FnPtr) -> Fallible<bool> {
        Ok(position(&ctx, list, &test, false)?.is_none())
    }
    #[rhai_fn(return_raw, pure)]
    pub fn reduce(ctx: NativeCallContext, list: &mut List, step: FnPtr) -> RhaiResult {
        fold(&ctx, list, &step, Dynamic::UNIT)
    }
    #[rhai_fn(name = "reduce", return_raw, pure)]
    pub fn reduce_from(ctx: NativeCallContext, list: &mut List, step: FnPtr, initial: Dynamic) -> RhaiResult {
        fold(&ctx, list, &step, initial)
    }
    /// Sorts into a new list, since the frozen one never changes: by a comparer of two items or by a key of one.
    #[rhai_fn(name = "sort", name = "sort_by", name = "order", name = "order_by", return_raw, pure)]
    pub fn sort_with(ctx: NativeCallContext, list: &mut List, compare: FnPtr) -> Fallible<List> {
        if takes(&ctx, &compare, 1) {
            let mut key = Callable::new(&ctx, &compare);
            return Ok(sorted_by(&list.0, |i, item| key.call(item, i))?.into());
        }
        let mut compare = PairCallable::new(&ctx, &compare);
        let sorted = merge_sort(list.0.to_vec(), &mut |a, b| precedes(&compare.call(a.clone(), b.clone())?))?;
        Ok(sorted.into())
    }
    #[rhai_fn(name = "sort", name = "order", return_raw, pure)]
    pub fn sort(list: &mut List) -> Fallible<List> {
        let compare = &mut |a: &Dynamic, b: &Dynamic| Ok(order(a, b)? != Ordering::Greater);
        Ok(merge_sort(list.0.to_vec(), compare)?.into())
    }
    #[rhai_fn(name = "sort_by", name = "order_by", return_raw, pure)]
    pub fn sort_by_field(list: &mut List, field: &str) -> Fallible<List> {
        Ok(sorted_by(&list.0, |_, item| field_of(item, field))?.into())
    }
    #[rhai_fn(return_raw, pure)]
    pub fn min_by(list: &mut List, field: &str) -> RhaiResult {
        best_by(&list.0, field, Ordering::Less)
    }
    #[rhai_fn(return_raw, pure)]
    pub fn max_by(list: &mut List, field: &str) -> RhaiResult {
        best_by(&list.0, field, Ordering::Greater)
    }
    #[rhai_fn(pure, volatile)]
    pub fn random(list: &mut List) -> Dynamic {
        any_of(&list.0)
    }
    #[rhai_fn(name = "to_string", name = "to_debug", name = "print", name = "debug", pure)]
    pub fn to_text(list: &mut List) -> String {
        list.to_string()
    }
}

#[export_module]
mod arrays {
    #[rhai_fn(pure)]
    pub fn first(array: &mut Array) -> Dynamic {
        array.first().cloned().unwrap_or_default()
    }
    #[rhai_fn(pure)]
    pub fn last(array: &mut Array) -> Dynamic {
        array.last().cloned().unwrap_or_default()
    }
    /// Sorts in place, as Rhai does, and also gives the array, so that calls can be chained as on frozen lists.
    #[rhai_fn(name = "sort_by", return_raw)]
    pub fn sort_array_with(ctx: NativeCallContext, array: &mut Array, compare: FnPtr) -> Fallible<Array> {
        let sorted = if takes(&ctx, &compare, 1) {
            let mut key = Callable::new(&ctx, &compare);
            sorted_by(array, |i, item| key.call(item, i))?
        } else {
            let mut compare = PairCallable::new(&ctx, &compare);
            merge_sort(array.clone(), &mut |a, b| precedes(&compare.call(a.clone(), b.clone())?))?
        };
        array.clone_from(&sorted);
        Ok(sorted)
    }
    #[rhai_fn(name = "sort_by", name = "order_by", return_raw, pure)]
    pub fn sort_by_field(array: &mut Array, field: &str) -> Fallible<Array> {
        sorted_by(array, |_, item| field_of(item, field))
    }
    #[rhai_fn(return_raw, pure)]
    pub fn min_by(array: &mut Array, field: &str) -> RhaiResult {
        best_by(array, field, Ordering::Less)
    }
    #[rhai_fn(return_raw, pure)]
    pub fn max_by(array: &mut Array, field: &str) -> RhaiResult {
        best_by(array, field, Ordering::Greater)
    }
    #[rhai_fn(pure, volatile)]
    pub fn random(array: &mut Array) -> Dynamic {
        any_of(array)
    }
}

#[export_module]
mod records {
    #[rhai_fn(name = "==", pure)]
    pub fn equals(record: &mut Record, other: Record) -> bool {
        record.is_same(&other)
    }
    #[rhai_fn(name = "!=", pure)]
    pub fn differs(record: &mut Record, other: Record) -> bool {
        !record.is_same(&other)
    }
    #[rhai_fn(pure)]
    pub fn contains(record: &mut Record, name: &str) -> bool {
        record.get(name).is_some()
    }
    #[rhai_fn(pure)]
    pub fn keys(record: &mut Record) -> Array {
        record.names().iter().cloned().map(Dynamic::from).collect()
    }
    #[rhai_fn(name = "to_string", name = "to_debug", name = "print", name = "debug", pure)]
    pub fn to_text(record: &mut Record) -> String {
        record.to_string()
    }
}

/// A script's index, counted from the end if negative, as a place in a list of `len`.
fn place(index: INT, len: usize) -> Option<usize> {
    let index = isize::try_from(index).ok()?;
    let place = if index < 0 { len.checked_add_signed(index)? } else { index.unsigned_abs() };
    (place < len).then_some(place)
}

/// The first item for which `test` answers `wanted`.
fn position(ctx: &NativeCallContext, list: &List, test: &FnPtr, wanted: bool) -> Fallible<Option<usize>> {
    let mut test = Callable::new(ctx, test);
    for (i, item) in list.0.iter().enumerate() {
        if test.test(item, i)? == wanted {
            return Ok(Some(i));
        }
    }
    Ok(None)
}

fn fold(ctx: &NativeCallContext, list: &List, step: &FnPtr, initial: Dynamic) -> RhaiResult {
    let mut step = PairCallable::new(ctx, step);
    let mut sum = initial;
    for item in list.0.iter() {
        sum = step.call(sum, item.clone())?;
        // A fold may grow a value past every limit, since each step is a call that Rhai does not see.
        ctx.engine().ensure_data_size_within_limits(&sum)?;
    }
    Ok(sum)
}

fn same(a: &Dynamic, b: &Dynamic) -> bool {
    if let (Some(a), Some(b)) = (a.read_lock::<Record>(), b.read_lock::<Record>()) {
        return a.is_same(&b);
    }
    matches!(compare(a, b), Some(Ordering::Equal)) || (a.is_unit() && b.is_unit())
}

/// The value that a field has in an item; unknown fields of records are errors.
fn field_of(item: &Dynamic, field: &str) -> RhaiResult {
    if let Some(record) = item.read_lock::<Record>() {
        return record.get(field).cloned().ok_or_else(|| record.missing(field));
    }
    if let Some(map) = item.read_lock::<rhai::Map>() {
        let missing = || fail(&format!("the map has no property '{field}'"));
        return map.get(field).cloned().ok_or_else(missing);
    }
    Err(fail(&format!("cannot read '{field}' of a {}", item.type_name())))
}

/// The item with the least or the greatest field. The first of equals wins; an unknown value, `()` or NaN, never beats
/// a known one.
fn best_by(items: &[Dynamic], field: &str, wanted: Ordering) -> RhaiResult {
    let mut best: Option<(&Dynamic, Dynamic)> = None;
    for item in items {
        let value = field_of(item, field)?;
        let wins = match &best {
            None => true,
            Some((_, held)) if is_unknown(held) => !is_unknown(&value),
            Some(_) if is_unknown(&value) => false,
            Some((_, held)) => order(&value, held)? == wanted,
        };
        if wins {
            best = Some((item, value));
        }
    }
    Ok(best.map_or(Dynamic::UNIT, |(item, _)| item.clone()))
}

/// The items in ascending order of a key; equals keep their order and unknown values come last.
fn sorted_by(
    items: &[Dynamic],
    mut key: impl FnMut(usize, &Dynamic) -> RhaiResult,
) -> Fallible<Vec<Dynamic>> {
    let keyed: Fallible<Vec<_>> =
        items.iter().enumerate().map(|(i, item)| Ok((key(i, item)?, item.clone()))).collect();
    let sorted = merge_sort(keyed?, &mut |a, b| Ok(order(&a.0, &b.0)? != Ordering::Greater))?;
    Ok(sorted.into_iter().map(|(_, item)| item).collect())
}

fn is_unknown(value: &Dynamic) -> bool {
    value.is_unit() || value.as_float().is_ok_and(f64::is_nan)
}

fn order(a: &Dynamic, b: &Dynamic) -> Fallible<Ordering> {
    match (is_unknown(a), is_unknown(b)) {
        (false, false) => {}
        (a, b) => return Ok(a.cmp(&b)),
    }
    compare(a, b).ok_or_else(|| fail(&format!("cannot order {} and {}", a.type_name(), b.type_name())))
}

fn compare(a: &Dynamic, b: &Dynamic) -> Option<Ordering> {
    if let (Ok(a), Ok(b)) = (a.as_int(), b.as_int()) {
        return Some(a.cmp(&b));
    }
    if let (Some(a), Some(b)) = (number(a), number(b)) {
        return a.partial_cmp(&b);
    }
    if let (Ok(a), Ok(b)) = (a.as_immutable_string_ref(), b.as_immutable_string_ref()) {
        return Some(a.as_str().cmp(b.as_str()));
    }
    if let (Ok(a), Ok(b)) = (a.as_bool(), b.as_bool()) {
        return Some(a.cmp(&b));
    }
    if let (Ok(a), Ok(b)) = (a.as_char(), b.as_char()) {
        return Some(a.cmp(&b));
    }
    None
}

#[allow(clippy::cast_precision_loss)]
fn number(value: &Dynamic) -> Option<f64> {
    value.as_float().or_else(|_| value.as_int().map(|n| n as f64)).ok()
}

/// Read a comparer's answer: a negative number, zero or true keep the order.
fn precedes(answer: &Dynamic) -> Fallible<bool> {
    if let Some(difference) = number(answer) {
        return Ok(difference <= 0.0 || difference.is_nan());
    }
    answer.as_bool().map_err(|found| fail(&format!("a comparer must return a number or a bool, not {found}")))
}

/// A stable sort that passes errors on and, unlike the standard one, accepts a comparer that contradicts itself.
fn merge_sort<T: Clone>(
    items: Vec<T>,
    in_order: &mut impl FnMut(&T, &T) -> Fallible<bool>,
) -> Fallible<Vec<T>> {
    if items.len() < 2 {
        return Ok(items);
    }
    let mut left = items;
    let right = left.split_off(left.len() / 2);
    let left = merge_sort(left, in_order)?;
    let right = merge_sort(right, in_order)?;
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        let from_left = in_order(a, b)?;
        merged.extend(if from_left { left.next() } else { right.next() });
    }
    merged.extend(left);
    merged.extend(right);
    Ok(merged)
}

/// A random item. The standard library's hash keys are seeded by the operating system and differ at every use.
fn any_of(items: &[Dynamic]) -> Dynamic {
    use std::hash::{BuildHasher, Hasher};
    if items.is_empty() {
        return Dynamic::UNIT;
    }
    let number = std::collections::hash_map::RandomState::new().build_hasher().finish();
    let place = number % items.len() as u64;
    items[usize::try_from(place).unwrap_or(0)].clone()
}

fn fail(message: &str) -> Box<EvalAltResult> {
    EvalAltResult::ErrorRuntime(message.into(), Position::NONE).into()
}
