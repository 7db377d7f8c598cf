//! Child processes: each in its own process group, killed as a group, reaped without races.

use std::io::{self, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hgct_control::message::Exit;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// Most bytes of a child's output that are kept.
const MAX_OUTPUT: u64 = 1 << 20;
/// How long the output of a child that has ended may still take to arrive.
const DRAIN: Duration = Duration::from_millis(500);

/// The process group that a child leads. Cloneable; signals stop having an effect once the leader
/// is reaped, so that they can never hit a stranger with a reused number.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    leader: Pid,
    reaped: Arc<Mutex<bool>>,
}

impl Group {
    /// Starts `command` as the leader of a new group.
    pub(crate) fn spawn(command: &mut Command) -> io::Result<(Child, Self)> {
        let child = command.process_group(0).spawn()?;
        let leader = Pid::from_child(&child);
        Ok((child, Self { leader, reaped: Arc::new(Mutex::new(false)) }))
    }

    /// Process id of the leader.
    pub(crate) fn id(&self) -> u32 {
        self.leader.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal to the whole group; nothing once the leader is reaped.
    pub(crate) fn signal(&self, signal: Signal) {
        let reaped = self.lock();
        if !*reaped {
            // A group that has just gone is what was wanted.
            let _ = rustix::process::kill_process_group(self.leader, signal);
        }
    }

    /// Waits until the leader ends, kills what it left behind in the group and reaps it.
    pub(crate) fn wait(&self, mut child: Child) -> io::Result<ExitStatus> {
        // Without reaping: as long as the leader is a zombie, its number belongs to this group.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        loop {
            match rustix::process::waitid(WaitId::Pid(self.leader), look) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => break,
            }
        }
        let mut reaped = self.lock();
        let _ = rustix::process::kill_process_group(self.leader, Signal::KILL);
        let status = child.wait();
        *reaped = true;
        status
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.reaped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a process ended. Prints as `exit code 1`, `signal 9 (SIGKILL)`.
pub(crate) fn describe(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code { code },
        (None, Some(signal)) => Exit::Signal { signal },
        // Only a stopped process has neither, and a stopped one has not ended.
        (None, None) => Exit::NotStarted { reason: "an unknown status".into() },
    }
}

/// What became of a child that was given a deadline.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How it ended; `None` if it was killed at the deadline.
    pub(crate) status: Option<ExitStatus>,
    /// Its standard output, up to a megabyte.
    pub(crate) stdout: String,
    /// Its standard error, up to a megabyte.
    pub(crate) stderr: String,
}

impl Outcome {
    /// The last line of standard error that is not empty, for a reason.
    pub(crate) fn last_words(&self) -> &str {
        self.stderr.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("")
    }
}

enum Heard {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Ended(io::Result<ExitStatus>),
}

/// Runs a command to its end, or kills its group at the deadline.
pub(crate) fn run_bounded(command: &mut Command, deadline: Duration) -> io::Result<Outcome> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let end = Instant::now() + deadline;
    let (mut child, group) = Group::spawn(command)?;
    let (sender, receiver) = channel();
    read_all(child.stdout.take(), sender.clone(), Heard::Stdout);
    read_all(child.stderr.take(), sender.clone(), Heard::Stderr);
    let waiting = group.clone();
    std::thread::spawn(move || sender.send(Heard::Ended(waiting.wait(child))));

    let (mut status, mut stdout, mut stderr) = (None, None, None);
    let mut until = end;
    while status.is_none() || stdout.is_none() || stderr.is_none() {
        match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Heard::Stdout(bytes)) => stdout = Some(bytes),
            Ok(Heard::Stderr(bytes)) => stderr = Some(bytes),
            Ok(Heard::Ended(ended)) => {
                status = Some(ended?);
                // A stray descendant outside of the group may hold the pipes open for ever.
                until = Instant::now() + DRAIN;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    if status.is_none() {
        group.signal(Signal::KILL);
    }
    let text = |bytes: Option<Vec<u8>>| String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
    Ok(Outcome { status, stdout: text(stdout), stderr: text(stderr) })
}

fn read_all(pipe: Option<impl Read + Send + 'static>, sender: Sender<Heard>, heard: fn(Vec<u8>) -> Heard) {
    let Some(mut pipe) = pipe else { return };
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        // An error here is a pipe that broke: what came before it is what there is.
        let _ = pipe.by_ref().take(MAX_OUTPUT).read_to_end(&mut kept);
        let _ = io::copy(&mut pipe, &mut io::sink());
        sender.send(heard(kept))
    });
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_end_within_the_deadline_is_described() {
        let outcome =
            run_bounded(&mut shell("echo out; echo err >&2; exit 3"), Duration::from_secs(20)).unwrap();
        assert_eq!(describe(outcome.status.unwrap()).to_string(), "exit code 3");
        assert_eq!((outcome.stdout.as_str(), outcome.last_words()), ("out\n", "err"));
        let outcome = run_bounded(&mut shell("kill -SEGV $$"), Duration::from_secs(20)).unwrap();
        assert_eq!(describe(outcome.status.unwrap()), Exit::Signal { signal: 11 });
    }

    #[test]
    fn a_child_that_never_ends_is_killed_with_its_children() {
        // Both hold a FIFO open for writing; its reader sees the end only when both are gone.
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let script = format!("mkfifo {0}; exec 9<>{0}; sleep 1000 & sleep 1000", fifo.display());
        let outcome = run_bounded(&mut shell(&script), Duration::from_millis(300)).unwrap();
        assert!(outcome.status.is_none());
        let (path, flags) = (fifo.clone(), libc::O_NONBLOCK);
        let reader = std::thread::spawn(move || std::fs::read(fifo).map(|bytes| bytes.len()));
        // Opening it for reading waits for a writer if there is none: one that comes and goes lets it
        // through in any case, and does not wait for a reader that has already gone.
        while !reader.is_finished() {
            drop(std::fs::OpenOptions::new().write(true).custom_flags(flags).open(&path));
            std::thread::yield_now();
        }
        assert_eq!(reader.join().unwrap().unwrap(), 0);
    }

    #[test]
    fn a_missing_program_is_an_error() {
        assert!(run_bounded(&mut Command::new("/nonexistent/program"), Duration::from_secs(1)).is_err());
    }

    #[test]
    fn endless_output_is_cut() {
        let outcome = run_bounded(&mut shell("yes | head -c 3000000"), Duration::from_secs(20)).unwrap();
        assert_eq!(outcome.stdout.len() as u64, MAX_OUTPUT);
        assert!(outcome.status.unwrap().success());
    }
}
