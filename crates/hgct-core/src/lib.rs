//! Documents and pure data types shared by every part of hgct.
//!
//! Data flows one way: [`cluster`] → [`profile`] → [`plan`] → launch → train → [`manifest`] →
//! report. Each arrow is a document that a person can read, diff and keep. Nothing here does I/O,
//! reads a clock or draws unseeded randomness.
//!
//! | Module | Holds |
//! | --- | --- |
//! | [`accelerator`] | the catalogue of accelerators, each figure with its source |
//! | [`architecture`] | any model the planner knows: parameters, flops and activations a layer |
//! | [`ids`] | ranks, generations, runs, devices |
//! | [`dtype`] | element types and memory kinds |
//! | [`model`] | a Llama-family architecture read from a `config.json` |
//! | [`mod@slice`] | logical slices: a row range of a named tensor, with dtype and role |
//! | [`init`] | initial parameters from (seed, tensor name, element index) |
//! | [`sample`] | the order of samples, from (seed, step) alone |
//! | [`cluster`] | nodes, devices, grants, links |
//! | [`topology`] | a large cluster as groups of like nodes, for planning |
//! | [`job`] | `job.toml`: model, data, recipe, policy |
//! | [`profile`] | what was measured |
//! | [`plan`] | the complete answer: stages, pipelines, owners, prediction |
//! | [`schedule`] | the plan's actions as data, one list a rank |
//! | [`check`] | what an engine says of itself, and the conformance suite's answer |
//! | [`timeline`] | start and end of every action, predicted or measured |
//! | [`manifest`] | a checkpoint's table of contents |

pub mod accelerator;
pub mod architecture;
pub mod canonical;
pub mod check;
pub mod cluster;
pub mod dtype;
mod error;
pub mod ids;
pub mod init;
pub mod job;
pub mod manifest;
pub mod model;
pub mod plan;
pub mod profile;
pub mod sample;
pub mod schedule;
pub mod slice;
pub mod suggest;
pub mod timeline;
pub mod topology;

pub use error::{Error, Result};
