//! Bytes in flight: who would add too many waits, so that memory stays bounded on both ways.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may wait between a reader and a writer.
#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    closed: bool,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), freed: Condvar::new() }
    }

    /// Takes `bytes` for what is about to wait; always, if nothing else does. False when there was
    /// no room within `patience`, and then they are taken all the same: the caller says what it
    /// makes of it.
    pub(super) fn take(&self, bytes: usize, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while state.used > 0 && state.used + bytes > self.limit && !state.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.used += bytes;
                return false;
            }
            state = self.freed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.used += bytes;
        true
    }

    /// Gives back what has left.
    pub(super) fn give(&self, bytes: usize) {
        let mut state = self.lock();
        state.used = state.used.saturating_sub(bytes);
        self.freed.notify_all();
    }

    /// Lets everybody through from now on: nothing waits any more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn who_would_exceed_the_limit_waits_until_there_is_room() {
        let budget = Budget::new(100);
        assert!(budget.take(300, LONG), "alone, anything may pass");
        assert!(!budget.take(1, Duration::from_millis(1)));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| budget.take(50, LONG));
            budget.give(301);
            assert!(waits.join().unwrap());
        });
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| budget.take(90, LONG));
            budget.close();
            assert!(waits.join().unwrap());
        });
    }
}
