//! A worker without Python: Burn over wgpu drives one Vulkan adapter (Metal on a Mac).

pub mod adapter;
mod engine;
mod error;
mod model;
pub mod plain;
pub mod probe;
mod stage;

pub use engine::{BURN_VERSION, BurnEngine};

/// Result of this crate: its errors are those of all engines.
pub type Result<T> = hgct_worker::Result<T>;
