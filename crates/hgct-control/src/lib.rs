//! Coordinator, agent and worker state machines and their wire messages, without I/O.

pub mod auth;
mod error;
mod float;
pub mod frame;
pub mod message;

pub use error::{Error, Result};
