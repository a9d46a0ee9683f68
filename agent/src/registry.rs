//! Things by their id, where the making of one takes time: an id is reserved first and filled at the end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A table of ids.
#[derive(Debug)]
pub struct Registry<T>(Mutex<HashMap<String, Entry<T>>>);

#[derive(Debug)]
enum Entry<T> {
    /// The id is taken by a creation under way.
    Reserved,
    Made(Arc<T>),
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Registry<T> {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Entry<T>>> {
        // Nothing panics while it is held, and a table is whole between any two operations.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has this id, and is complete.
    pub fn get(&self, id: &str) -> Option<Arc<T>> {
        match self.table().get(id) {
            Some(Entry::Made(made)) => Some(Arc::clone(made)),
            _ => None,
        }
    }

    /// Takes an id. `None` if it is taken already.
    pub fn reserve<'a>(&'a self, id: &'a str) -> Option<Reservation<'a, T>> {
        let mut table = self.table();
        if table.contains_key(id) {
            return None;
        }
        table.insert(id.to_owned(), Entry::Reserved);
        Some(Reservation { registry: self, id })
    }

    /// Forgets this thing; another one that has its id by now stays.
    pub fn remove(&self, id: &str, thing: &Arc<T>) {
        let mut table = self.table();
        if matches!(table.get(id), Some(Entry::Made(made)) if Arc::ptr_eq(made, thing)) {
            table.remove(id);
        }
    }

    /// All that is complete, with its ids.
    pub fn all(&self) -> Vec<(String, Arc<T>)> {
        let made = |(id, entry): (&String, &Entry<T>)| match entry {
            Entry::Reserved => None,
            Entry::Made(made) => Some((id.clone(), Arc::clone(made))),
        };
        self.table().iter().filter_map(made).collect()
    }
}

/// An id taken in the table, given back unless it is filled.
#[derive(Debug)]
pub struct Reservation<'a, T> {
    registry: &'a Registry<T>,
    id: &'a str,
}

impl<T> Reservation<'_, T> {
    /// Puts in what the id was taken for.
    pub fn fill(self, made: Arc<T>) {
        self.registry
            .table()
            .insert(self.id.to_owned(), Entry::Made(made));
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        let mut table = self.registry.table();
        if matches!(table.get(self.id), Some(Entry::Reserved)) {
            table.remove(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once_and_free_again_when_its_creation_fails() {
        let registry = Registry::<u32>::default();
        let first = registry.reserve("a").unwrap();
        assert!(registry.reserve("a").is_none());
        assert!(registry.get("a").is_none() && registry.all().is_empty());
        drop(first);
        let made = Arc::new(5);
        registry.reserve("a").unwrap().fill(Arc::clone(&made));
        assert!(registry.reserve("a").is_none());
        assert_eq!(registry.get("a").as_deref(), Some(&5));
        registry.remove("a", &made);
        assert!(registry.get("a").is_none());
    }

    #[test]
    fn what_is_forgotten_twice_does_not_take_its_successor_along() {
        let registry = Registry::<u32>::default();
        let (first, second) = (Arc::new(1), Arc::new(2));
        registry.reserve("a").unwrap().fill(Arc::clone(&first));
        registry.remove("a", &first);
        let reservation = registry.reserve("a").unwrap();
        registry.remove("a", &first);
        assert!(registry.reserve("a").is_none());
        reservation.fill(Arc::clone(&second));
        registry.remove("a", &first);
        assert_eq!(registry.get("a").as_deref(), Some(&2));
        assert_eq!(registry.all().len(), 1);
    }
}
