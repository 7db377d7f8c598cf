//! Locks that outlive a panic.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::time::Deadline;

/// Takes a lock, whether or not another thread panicked while it held it: every critical section
/// here leaves its data consistent at each step, and a panic elsewhere must not hide the first
/// error.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on a condition until it is notified or the deadline comes.
pub(crate) fn wait_until<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Deadline,
) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, deadline.remaining()).unwrap_or_else(PoisonError::into_inner).0
}
