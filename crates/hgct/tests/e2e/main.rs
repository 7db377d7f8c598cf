//! Runs across hosts, among strangers and on bad input: the real binary over real engines.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail as tests do")]

mod bad_input;
mod bad_plans;
mod ends;
mod experts;
mod hosts;
mod measured;
mod planning;
mod safety;
mod support;
mod vulkan;
