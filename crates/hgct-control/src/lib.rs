//! Coordinator, agent and worker state machines and their wire messages, without I/O.

pub mod message;
