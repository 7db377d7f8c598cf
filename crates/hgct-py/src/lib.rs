//! The PyO3 extension `hgct._core`: the Rust core inside of a Python worker.

mod engine;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::engine::PyEngine;

/// Runs a worker to its end on this thread. `make_engine(name, device, modules)` imports the
/// framework and opens the device; it is called once, when the agent has said which.
///
/// Takes the standard streams away first, and ends the process when the agent's pipe closes.
#[pyfunction]
fn run(py: Python<'_>, make_engine: Bound<'_, PyAny>) -> PyResult<i32> {
    let make_engine = make_engine.unbind();
    py.detach(move || {
        hgct_worker::runtime::run(|place| {
            let engine = PyEngine::open(&make_engine, place)?;
            Ok(Box::new(engine) as Box<dyn hgct_worker::engine::Engine>)
        })
    })
    .map_err(|error| PyRuntimeError::new_err(hgct_worker::error_chain(&error)))
}

/// The module.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(run, module)?)
}
