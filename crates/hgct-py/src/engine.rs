//! A Python engine behind the engine interface. One call an action; a lease crosses as plain
//! integers and an owner object.

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;

use hgct_core::dtype::DType;
use hgct_core::plan::StageId;
use hgct_worker::engine::{
    BackwardPart, Edge, Engine, EngineDescription, GradientReady, Granularity, ImportRows, Lease, StageLoad,
    Ticket,
};
use hgct_worker::runtime::EnginePlace;
use hgct_worker::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

/// What a lease is in Python: name, dtype, shape, address, bytes, owner.
type PyLease<'py> = (String, String, Vec<u64>, usize, usize, Bound<'py, PyAny>);

/// The same on its way into Python, where the owner stays behind.
type LentLease<'py> = (String, &'static str, Bound<'py, PyTuple>, usize, usize, Py<PyAny>);

/// An object that follows `python/hgct/engines/base.py`.
pub(crate) struct PyEngine {
    object: Py<PyAny>,
    description: EngineDescription,
}

impl PyEngine {
    /// Imports the framework and opens the device.
    pub(crate) fn open(make_engine: &Py<PyAny>, place: &EnginePlace) -> Result<Self> {
        let name = place.engine.as_str();
        Python::attach(|py| {
            let modules = PyTuple::new(py, &place.modules)?;
            let object = make_engine.call1(py, (name, place.device_string.as_str(), modules))?;
            let description = describe(object.bind(py))?;
            Ok(Self { object, description })
        })
        .map_err(|error| failed(name, "open", &error))
    }

    fn call<T>(
        &self,
        operation: &'static str,
        body: impl for<'py> FnOnce(Python<'py>, &Bound<'py, PyAny>) -> PyResult<T>,
    ) -> Result<T> {
        Python::attach(|py| {
            body(py, self.object.bind(py))
                .map_err(|error| failed(&self.description.engine, operation, &error))
        })
    }

    fn edge(&self, operation: &'static str, stage: StageId, inputs: &Edge) -> Result<Ticket<Edge>> {
        self.call(operation, |py, engine| {
            let answer = engine.call_method1(operation, (stage.0, lend_all(py, &inputs.tensors)?))?;
            Ok(Ticket::Ready(Edge::new(borrow_all(&answer)?)))
        })
    }
}

impl Engine for PyEngine {
    fn describe(&self) -> &EngineDescription {
        &self.description
    }

    fn load(&mut self, stages: &[StageLoad]) -> Result<()> {
        self.call("load", |py, engine| {
            let json = py.import("json")?;
            let list = PyList::empty(py);
            for load in stages {
                let model = json.call_method1("loads", (hgct_core::canonical::encode(&load.model),))?;
                model.set_item("inv_freq", load.model.inverse_frequencies())?;
                let stage = PyDict::new(py);
                stage.set_item("stage", load.stage.0)?;
                stage.set_item("model", model)?;
                stage.set_item("layers", (load.layers.start, load.layers.end))?;
                stage.set_item("recompute", load.recompute)?;
                list.append(stage)?;
            }
            engine.call_method1("load", (list,)).map(drop)
        })
    }

    fn import(&mut self, stage: StageId, rows: &[ImportRows]) -> Result<()> {
        self.call("import", |py, engine| {
            let list = PyList::empty(py);
            for row in rows {
                let (name, dtype, shape, address, bytes, owner) = lend(py, &row.lease)?;
                list.append((name, dtype, shape, address, bytes, owner, row.first_row))?;
            }
            engine.call_method1("import_tensors", (stage.0, list)).map(drop)
        })
    }

    fn export(&mut self, stage: StageId, names: &[String]) -> Result<Vec<Lease>> {
        self.call("export", |_, engine| {
            borrow_all(&engine.call_method1("export_tensors", (stage.0, names.to_vec()))?)
        })
    }

    fn zero_gradients(&mut self, stage: StageId) -> Result<()> {
        self.call("zero_gradients", |_, engine| engine.call_method1("zero_gradients", (stage.0,)).map(drop))
    }

    fn forward(&mut self, stage: StageId, micro_batch: u32, inputs: Edge) -> Result<Ticket<Edge>> {
        self.call("forward", |py, engine| {
            let answer =
                engine.call_method1("forward", (stage.0, micro_batch, lend_all(py, &inputs.tensors)?))?;
            Ok(Ticket::Ready(Edge::new(borrow_all(&answer)?)))
        })
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        part: BackwardPart,
        gradients: Edge,
        ready: Option<&mut GradientReady<'_>>,
    ) -> Result<Ticket<Edge>> {
        if part != BackwardPart::Full {
            return Err(Error::Engine {
                engine: self.description.engine.clone(),
                operation: "backward",
                message: "split backward is not supported yet".into(),
            });
        }
        let mut failure = None;
        let result = self.call("backward", |py, engine| {
            let leases = lend_all(py, &gradients.tensors)?;
            let Some(ready) = ready else {
                let answer = engine.call_method1("backward", (stage.0, micro_batch, leases, py.None()))?;
                return borrow_all(&answer);
            };
            let callback = Bound::new(py, Ready::new(ready))?;
            let answer = engine.call_method1("backward", (stage.0, micro_batch, leases, &callback));
            // Before the borrow of the closure ends, whatever the engine did with the callback.
            failure = callback.borrow().close();
            borrow_all(&answer?)
        });
        match failure {
            Some(error) => Err(error),
            None => result.map(|tensors| Ticket::Ready(Edge::new(tensors))),
        }
    }

    fn evaluate(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        self.edge("evaluate", stage, &inputs)
    }

    fn logits(&mut self, stage: StageId, inputs: Edge) -> Result<Ticket<Edge>> {
        self.edge("logits", stage, &inputs)
    }

    fn drop_micro_batch(&mut self, micro_batch: u32) -> Result<()> {
        self.call("drop", |_, engine| engine.call_method1("drop", (micro_batch,)).map(drop))
    }

    fn abort(&mut self) -> Result<()> {
        self.call("abort", |_, engine| engine.call_method0("abort").map(drop))
    }
}

/// The Python face of a [`GradientReady`] closure, good for the length of one backward.
#[pyclass(unsendable)]
struct Ready {
    closure: Cell<Option<NonNull<GradientReady<'static>>>>,
    failure: RefCell<Option<Error>>,
}

impl Ready {
    fn new(closure: &mut GradientReady<'_>) -> Self {
        let closure: NonNull<GradientReady<'_>> = NonNull::from(closure);
        // SAFETY: only the lifetime is erased. `close` takes the pointer away before the borrow
        // that it stands for ends, and `unsendable` keeps it on this thread.
        let closure = unsafe {
            std::mem::transmute::<NonNull<GradientReady<'_>>, NonNull<GradientReady<'static>>>(closure)
        };
        Self { closure: Cell::new(Some(closure)), failure: RefCell::new(None) }
    }

    /// Takes the closure away, and the error that it gave.
    fn close(&self) -> Option<Error> {
        self.closure.set(None);
        self.failure.borrow_mut().take()
    }
}

#[pymethods]
impl Ready {
    fn __call__(&self, layer: u32, leases: &Bound<'_, PyAny>) -> PyResult<()> {
        let leases = borrow_all(leases)?;
        let Some(mut closure) = self.closure.take() else {
            return Err(pyo3::exceptions::PyRuntimeError::new_err(
                "ready was called outside of its backward, or from itself",
            ));
        };
        // SAFETY: the closure is alive until `close` (see `new`), and taking it out of the cell
        // makes this the only reference.
        let result = unsafe { closure.as_mut() }(layer, leases);
        self.closure.set(Some(closure));
        result.map_err(|error| {
            let message = error.to_string();
            *self.failure.borrow_mut() = Some(error);
            pyo3::exceptions::PyRuntimeError::new_err(message)
        })
    }
}

fn describe(engine: &Bound<'_, PyAny>) -> PyResult<EngineDescription> {
    let facts = engine.call_method0("describe")?;
    let text = |key: &str| facts.get_item(key)?.extract::<String>();
    let flag = |key: &str| facts.get_item(key)?.extract::<bool>();
    let dtypes: Vec<String> = facts.get_item("dtypes")?.extract()?;
    Ok(EngineDescription {
        engine: text("engine")?,
        framework_version: text("version")?,
        device: text("device")?,
        dtypes: dtypes.iter().filter_map(|name| dtype(name)).collect(),
        granularity: if text("granularity")? == "layer" { Granularity::Layer } else { Granularity::Stage },
        split_backward: flag("split_backward")?,
        recompute: flag("recompute")?,
        tensor_parallel: flag("tensor_parallel")?,
        deterministic: flag("deterministic")?,
        memory_bytes: facts.get_item("memory_bytes")?.extract()?,
    })
}

/// A lease for the length of a call: its owner stays in Rust.
fn lend<'py>(py: Python<'py>, lease: &Lease) -> PyResult<LentLease<'py>> {
    let (address, bytes) = lease.raw();
    Ok((
        lease.name.clone(),
        lease.dtype.name(),
        PyTuple::new(py, &lease.shape)?,
        address.expose_provenance(),
        bytes,
        py.None(),
    ))
}

fn lend_all<'py>(py: Python<'py>, leases: &[Lease]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for lease in leases {
        list.append(lend(py, lease)?)?;
    }
    Ok(list)
}

/// Leases of an engine's memory, kept alive by their Python owners.
fn borrow_all(leases: &Bound<'_, PyAny>) -> PyResult<Vec<Lease>> {
    leases.try_iter()?.map(|lease| borrow(lease?.extract()?)).collect()
}

fn borrow((name, dtype_name, shape, address, bytes, owner): PyLease<'_>) -> PyResult<Lease> {
    let bad = |message: String| pyo3::exceptions::PyValueError::new_err(message);
    let dtype = dtype(&dtype_name).ok_or_else(|| bad(format!("{name}: unknown dtype {dtype_name}")))?;
    if bytes as u64 != dtype.size_bytes() * shape.iter().product::<u64>() || (address == 0 && bytes > 0) {
        return Err(bad(format!("{name}: {bytes} bytes at {address:#x} cannot be {dtype_name}{shape:?}")));
    }
    let owner: Py<PyAny> = owner.unbind();
    let address: *const u8 = std::ptr::with_exposed_provenance(address);
    // SAFETY: the engine interface (`base.py`) promises C-contiguous host memory that is valid and
    // unwritten while its owner lives; the size was checked against dtype and shape.
    Ok(unsafe { Lease::from_raw(name, dtype, shape, address, bytes, Box::new(owner)) })
}

fn dtype(name: &str) -> Option<DType> {
    [DType::F32, DType::F16, DType::Bf16, DType::I32].into_iter().find(|dtype| dtype.name() == name)
}

fn failed(engine: &str, operation: &'static str, error: &PyErr) -> Error {
    let message = Python::attach(|py| {
        let trace = error.traceback(py).and_then(|trace| trace.format().ok()).unwrap_or_default();
        format!("{error}\n{trace}").trim_end().to_owned()
    });
    Error::Engine { engine: engine.into(), operation, message }
}
