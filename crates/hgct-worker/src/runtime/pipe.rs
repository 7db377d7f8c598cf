//! The agent's pipe: orders on what was standard input, answers on what was standard output.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hgct_control::frame::{Decoder, Outbox, encode_header};
use hgct_control::message::{Envelope, FromWorker, ToWorker};
use hgct_core::ids::{Generation, RunId};

use crate::{Error, Result};

/// An order with its payload.
pub(super) type Received = (Envelope<ToWorker>, Vec<u8>);

/// Takes standard input and output away, so that a framework that prints cannot break the protocol:
/// reads give nothing from now on, prints go to standard error.
pub(super) fn take_standard_streams() -> Result<(File, File)> {
    let failed = |operation| {
        move |source: rustix::io::Errno| Error::File {
            operation,
            path: "standard streams".into(),
            source: source.into(),
        }
    };
    let input = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(failed("duplicate"))?;
    let output = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(failed("duplicate"))?;
    let null = File::open("/dev/null").map_err(|source| Error::File {
        operation: "open",
        path: "/dev/null".into(),
        source,
    })?;
    rustix::stdio::dup2_stdin(&null).map_err(failed("replace"))?;
    rustix::stdio::dup2_stdout(std::io::stderr()).map_err(failed("replace"))?;
    Ok((File::from(input), File::from(output)))
}

/// Reads orders until the pipe closes, which ends the process at once: the agent is gone or wants
/// it gone, and the main thread may be anywhere inside of a framework.
pub(super) fn read_orders(mut input: File, orders: &Sender<Received>, stop: &AtomicBool) {
    let mut decoder = Decoder::<ToWorker>::new();
    let mut buffer = vec![0; 1 << 16];
    let code = loop {
        match decoder.next_frame() {
            Ok(Some((envelope, payload))) => {
                match envelope.message {
                    ToWorker::Exit => break 0,
                    ToWorker::Stop => stop.store(true, Ordering::Relaxed),
                    _ => {}
                }
                if orders.send((envelope, payload)).is_err() {
                    break 0;
                }
            }
            Ok(None) => match input.read(&mut buffer) {
                Ok(0) => break 0,
                Ok(read) => decoder.push(&buffer[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    eprintln!("hgct worker: reading orders failed: {error}");
                    break 1;
                }
            },
            Err(error) => {
                eprintln!("hgct worker: {}", crate::error_chain(&error));
                break 1;
            }
        }
    };
    exit_now(code);
}

/// Ends the process without running anybody's exit handlers: a framework's may hang or wait for
/// the interpreter's lock.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions; nothing of ours needs an exit handler.
    unsafe { libc::_exit(code) }
}

/// The writing half.
pub(super) struct Pipe {
    output: File,
    run: RunId,
    outbox: Outbox,
    generation: Generation,
}

impl Pipe {
    pub(super) fn new(output: File, run: RunId, generation: Generation) -> Self {
        Self { output, outbox: Outbox::new(run.clone()), run, generation }
    }

    /// Messages from now on belong to this generation.
    pub(super) fn enter(&mut self, generation: Generation) {
        self.generation = generation;
    }

    /// The run.
    pub(super) fn run(&self) -> &RunId {
        &self.run
    }

    /// Writes a message and its payload.
    pub(super) fn send(&mut self, message: FromWorker, payload: &[u8]) -> Result<()> {
        let envelope = self.outbox.seal(self.generation, message);
        let header = encode_header(&envelope, payload.len())?;
        self.output
            .write_all(&header)
            .and_then(|()| self.output.write_all(payload))
            .map_err(|source| Error::File { operation: "write to", path: "the agent's pipe".into(), source })
    }
}

/// The pipe, whatever happened to a thread that held it: frames are written whole or the pipe is
/// broken, which the next write tells.
pub(super) fn locked(pipe: &Mutex<Pipe>) -> MutexGuard<'_, Pipe> {
    pipe.lock().unwrap_or_else(PoisonError::into_inner)
}
