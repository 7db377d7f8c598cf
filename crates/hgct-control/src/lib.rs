//! Coordinator, agent and worker state machines and their wire messages, without I/O.

pub mod agent;
pub mod auth;
pub mod coordinator;
pub mod detector;
mod error;
mod float;
pub mod frame;
pub mod message;
mod payload;

pub use error::{Error, Result};
