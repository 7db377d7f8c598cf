//! Whole instances: search against brute force, bounds, memory, text.

mod brute;
mod fixture;
mod plans;
