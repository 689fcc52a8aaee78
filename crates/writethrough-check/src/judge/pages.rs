//! What a page of a list says by leaving an item out.
//!
//! A page is one answer to one question, so it is a read of every item in its window: those shown
//! had the value shown at some moment between the page's start and end, and those of the window
//! that are *not* shown did not exist at some moment between start and end. So lists need no rules
//! of their own. An item missing although its create was acknowledged, or shown although its delete
//! was acknowledged, contradicts the item's register like a wrong read.
//!
//! The window is made of creation times that the service itself states, strictly between the last
//! item of the page before and the last item of this one (or open, when no page follows). Creation
//! times never change, so it does not matter which clock made them, and items that share a time
//! with the edge are left out of the argument. Items that come or go while the page is loaded are
//! concurrent with it and may be there or not: the register's rules allow both. Pages are not taken
//! to be one snapshot of *all* their items, since the service promises linearizability per item.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;

use super::observation::Op;
use super::writes::Writes;
use crate::history::{Action, Key, Outcome};

/// Finds all (item, list operation) where the page left out an item of its window that may have
/// existed.
///
/// Items whose delete was acknowledged before the page's start are not reported: their absence says
/// nothing new.
pub(crate) fn omissions(writes: &Writes<'_>) -> Vec<(Key, Op)> {
    let history = writes.history;
    let mut created: HashMap<Key, i64> = HashMap::new();
    let mut pages = Vec::new();
    for (op, operation) in Op::all(history) {
        if let Some(page) = history.page(operation) {
            if page.window.is_some() {
                pages.push((operation.start, op));
            }
            for entry in history.entries(page) {
                if let Some(at) = entry.created {
                    created.entry(entry.key).or_insert(at);
                }
            }
        } else if operation.action == Action::Create
            && operation.outcome == Outcome::Ok
            && let (Some(key), Some(at)) = (operation.key, operation.created)
        {
            created.entry(key).or_insert(at);
        }
    }
    if pages.is_empty() {
        return Vec::new();
    }
    pages.sort_unstable();

    let mut arrivals = Vec::new();
    let mut departures = Vec::new();
    for key in writes.judged_keys() {
        let (Some(create), Some(&at)) = (writes.create(key), created.get(&key)) else {
            continue;
        };
        arrivals.push((writes.operation(create).start, at, key));
        if let Some(delete) = writes.deletion(key).acknowledged {
            departures.push((writes.operation(delete).end, at, key));
        }
    }
    arrivals.sort_unstable();
    departures.sort_unstable();
    let (mut arrivals, mut departures) = (
        arrivals.into_iter().peekable(),
        departures.into_iter().peekable(),
    );

    let mut living: BTreeSet<(i64, Key)> = BTreeSet::new();
    let mut shown_on: Vec<Option<Op>> = vec![None; history.key_count()];
    let mut omissions = Vec::new();
    for (start, op) in pages {
        while let Some((_, at, key)) = arrivals.next_if(|&(arrival, ..)| arrival <= start) {
            living.insert((at, key));
        }
        while let Some((_, at, key)) = departures.next_if(|&(departure, ..)| departure < start) {
            living.remove(&(at, key));
        }
        let Some(page) = history.page(writes.operation(op)) else {
            continue;
        };
        let Some((newer, older)) = page.window else {
            continue;
        };
        for entry in history.entries(page) {
            shown_on[entry.key.0 as usize] = Some(op);
        }
        if older
            .zip(newer)
            .is_some_and(|(older, newer)| older >= newer)
        {
            continue;
        }
        let from = older.map_or(Bound::Unbounded, |at| Bound::Excluded((at, Key(u32::MAX))));
        let to = newer.map_or(Bound::Unbounded, |at| Bound::Excluded((at, Key(0))));
        for &(_, key) in living.range((from, to)) {
            if shown_on[key.0 as usize] != Some(op) {
                omissions.push((key, op));
            }
        }
    }
    omissions
}
