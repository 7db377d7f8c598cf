//! Whole instances: search against brute force, bounds, memory, text.

mod brute;
pub(crate) mod fixture;
mod plans;
mod starts;
