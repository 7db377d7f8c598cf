//! The plain model in f64: what every engine is measured against.
//!
//! Written to be read, not to be fast: each operator is a forward and a backward over row-major
//! slices, tested by finite differences. [`ReferenceEngine`] puts it behind the engine interface,
//! so that everything above an engine can be tested without a framework; [`FaultyEngine`] breaks
//! an engine in one known way, so that a check can be shown to fail.

mod engine;
mod faulty;
mod layers;
mod operators;

pub use engine::ReferenceEngine;
pub use faulty::{Fault, FaultyEngine, SMALL_MEMORY_TOKENS};

#[cfg(test)]
mod tests;
