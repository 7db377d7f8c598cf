//! The PyO3 extension `hgct._core`: the Rust core inside of a Python worker.

mod engine;

use pyo3::exceptions::{PyRuntimeError, PySystemExit};
use pyo3::prelude::*;

use crate::engine::PyEngine;

/// Which sources of the core this was built from.
const CORE: &str = env!("HGCT_CORE");

/// Runs a worker to its end on this thread. `make_engine(name, device, modules)` imports the
/// framework and opens the device; it is called once, when the agent has said which.
///
/// Takes the standard streams away first, and ends the process when the agent's pipe closes.
#[pyfunction]
fn run(py: Python<'_>, make_engine: Bound<'_, PyAny>) -> PyResult<i32> {
    // Before the first order is read, whose form may be another one.
    if let Ok(theirs) = std::env::var("HGCT_CORE")
        && theirs != CORE
    {
        return Err(PySystemExit::new_err(format!(
            "the hgct wheel of this environment is stale: it was built from another version of the core ({CORE}) \
             than the hgct that starts it ({theirs}): run `make set-up`"
        )));
    }
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
    module.add("__core__", CORE)?;
    module.add_function(wrap_pyfunction!(run, module)?)
}
