//! A worker process: takes orders from its agent's pipe, drives one engine, tells what it does.
//!
//! Three threads: this one makes all engine calls; one reads the pipe and ends the process when it
//! closes; one beats. The process never outlives its agent, whatever the framework is doing.

mod pipe;
mod session;
mod shard;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hgct_comm::monotonic_ns;
use hgct_control::message::{FromWorker, ToWorker, WorkerBeat};
use hgct_core::ids::{Generation, RunId};

use self::pipe::Pipe;
use self::session::Session;
use crate::engine::Engine;
use crate::memory::resident_bytes;
use crate::train::Progress;
use crate::{Error, Result};

/// Which engine to open on which device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePlace {
    /// `torch`, `jax`, …
    pub engine: String,
    /// The framework's own device string.
    pub device_string: String,
    /// Plug-in modules to import with the framework.
    pub modules: Vec<String>,
}

/// Runs the worker until its agent says so or goes away. Answers with the exit code.
pub fn run(open: impl FnOnce(&EnginePlace) -> Result<Box<dyn Engine>>) -> Result<i32> {
    let (input, output) = pipe::take_standard_streams()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (orders, inbox) = channel();
    let reader_stop = Arc::clone(&stop);
    spawn("hgct-orders", move || pipe::read_orders(input, &orders, &reader_stop))?;

    let Some((attach, run, generation)) = first_order(&inbox) else { return Ok(0) };
    let ToWorker::Attach { heartbeat_ns, ref engine, ref device_string, ref modules, .. } = attach else {
        return Err(Error::Orders { message: "the first order must be `attach`".into() });
    };
    let pipe = Arc::new(Mutex::new(Pipe::new(output, run, generation)));
    let progress = Arc::new(Progress::default());
    let (beat_pipe, beat_progress) = (Arc::clone(&pipe), Arc::clone(&progress));
    spawn("hgct-heartbeat", move || beat(&beat_pipe, &beat_progress, Duration::from_nanos(heartbeat_ns)))?;

    let place = EnginePlace {
        engine: engine.clone(),
        device_string: device_string.clone(),
        modules: modules.clone(),
    };
    let mut session = Session::new(Arc::clone(&pipe), progress, stop, attach);
    let result = open(&place).and_then(|engine| session.open(engine)).and_then(|()| {
        while let Ok((order, payload)) = inbox.recv() {
            session.obey(order.message, &payload, order.generation)?;
        }
        Ok(())
    });
    if let Err(error) = &result {
        let culprit = match error {
            Error::Comm(error) => error.culprit(),
            _ => None,
        };
        let failed = FromWorker::Failed { error: crate::error_chain(error), peer: culprit };
        // The agent hears of the exit anyway; a broken pipe adds nothing.
        let _ = pipe::locked(&pipe).send(failed, &[]);
    }
    result.map(|()| 0)
}

type Inbox = Receiver<pipe::Received>;

fn first_order(inbox: &Inbox) -> Option<(ToWorker, RunId, Generation)> {
    let (envelope, _) = inbox.recv().ok()?;
    Some((envelope.message, envelope.run, envelope.generation))
}

/// Tells what the worker does, for as long as the pipe takes it.
fn beat(pipe: &Mutex<Pipe>, progress: &Progress, every: Duration) {
    loop {
        let look = progress.look();
        let beat = WorkerBeat {
            now_ns: monotonic_ns(),
            step: look.step,
            action: look.action,
            waits: look.waits,
            since_ns: look.since_ns,
            completed: look.completed,
            memory_bytes: resident_bytes(),
        };
        if pipe::locked(pipe).send(FromWorker::Beat(beat), &[]).is_err() {
            return;
        }
        std::thread::sleep(every);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(|source| Error::File {
        operation: "start",
        path: format!("thread {name}"),
        source,
    })
}

/// Whether a stop was asked for.
fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
