//! What was made of a text, remembered: the same few allow-lists are asked for on every request.
//! Depends on `allow_list` for its bound only; called by the parent.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::allow_list::MAX_TEXT_BYTES;

/// As many distinct allow-lists as the pods of a node usually have. With each list's own bounds, this bounds
/// the memory that hostile ones can take.
pub(super) const MAX_TEXTS: usize = 16;

/// A bounded map from texts to what they mean. When it is full it starts over, which costs no more than the
/// first requests did.
#[derive(Debug)]
pub(super) struct Memo<T>(Mutex<HashMap<Box<str>, Arc<T>>>);

impl<T> Default for Memo<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Memo<T> {
    /// What was made of `text` before, or what `make` makes of it now. `make` runs outside of the lock.
    pub(super) fn of(&self, text: &str, make: impl FnOnce() -> T) -> Arc<T> {
        // A poisoned map is consistent: no code panics in the middle of a change.
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(text).cloned();
        known.unwrap_or_else(|| {
            let made = Arc::new(make());
            if text.len() > MAX_TEXT_BYTES {
                return made;
            }
            let mut texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if texts.len() >= MAX_TEXTS {
                texts.clear();
            }
            texts.insert(text.into(), Arc::clone(&made));
            made
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_once_and_stays_bounded() {
        let memo = Memo::default();
        let mut made = 0;

        for text in ["0", "0", "1"] {
            memo.of(text, || made += 1);
        }
        for number in 0..10 * MAX_TEXTS {
            memo.of(&number.to_string(), || ());
            assert!(memo.0.lock().unwrap().len() <= MAX_TEXTS);
        }
        memo.of("last", || ());
        memo.of(&" ".repeat(MAX_TEXT_BYTES + 1), || ());

        assert_eq!(made, 2);
        let kept = memo.0.lock().unwrap();
        assert!(kept.contains_key("last") && kept.keys().all(|text| text.len() <= MAX_TEXT_BYTES));
    }
}
