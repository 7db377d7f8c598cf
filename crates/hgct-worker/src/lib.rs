//! What every worker does: the engine interface, the interpreter of schedule actions, gradient
//! exchange, the optimizer, the plain f64 reference model and the conformance suite.

pub mod conformance;
pub mod engine;
mod error;
mod memory;
pub mod optimizer;
pub mod profiling;
pub mod reference;
pub mod runtime;
pub mod train;

pub use error::{Error, Result, error_chain, panic_message};
