//! The search over pools against brute force, a second pricer, and properties.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod brute;
mod cases;
mod experts;
mod overlap;
mod pricer;
mod properties;
mod replanning;
mod replay;
mod shadow;
