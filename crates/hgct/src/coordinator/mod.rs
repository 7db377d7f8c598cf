//! The coordinator's shell: sockets, threads and the clock around `hgct_control`'s machine.
//!
//! One thread owns the machine and an inbox of events. A listener authenticates connections, each
//! with its deadline, so a stranger holds up nobody; a connection has a thread that reads and one
//! that writes. The driver (a command such as `train`) gives commands and hears updates.

mod connection;
mod outgoing;
mod signals;
mod urgent;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hgct_comm::monotonic_ns;
use hgct_control::auth::Token;
use hgct_control::coordinator::{Command, Config, Coordinator, Effect, Event, Outcome, Update};

use self::connection::Connections;
use self::outgoing::Outgoing;
pub(crate) use self::signals::{block_signals, next_signal};
use self::urgent::{Inbox, Urgent};

/// Events and updates that may wait; with pieces of at most 1 MiB this bounds memory.
const QUEUE: usize = 24;

/// How soon to look again whether a driver that is behind has room.
const ROOM: Duration = Duration::from_millis(10);

/// Bytes that may wait for an agent before the driver waits.
const MAX_QUEUED_BYTES: u64 = 8 << 20;

/// A running coordinator, as its driver sees it.
pub(crate) struct Shell {
    events: SyncSender<Event>,
    urgent: Urgent,
    updates: Receiver<Update>,
    queued: Arc<AtomicU64>,
    address: SocketAddr,
    outcome: Option<Outcome>,
}

impl Shell {
    /// Listens at `listen` and waits for agents. Ctrl-C and SIGTERM become stops; call
    /// [`block_signals`] before any thread starts.
    pub(crate) fn start(config: Config, token: Token, listen: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(listen).with_context(|| {
            format!("cannot listen on {listen}: choose another port with --listen (0 lets the system choose)")
        })?;
        let address = listener.local_addr()?;
        let (events, inbox) = sync_channel(QUEUE);
        let (urgent, inbox) = urgent::join(&events, inbox);
        let (outbox, updates) = sync_channel(QUEUE);
        let queued = Arc::new(AtomicU64::new(0));
        let connections = Connections::new(events.clone(), Arc::clone(&queued));
        connections.listen(listener, config.run.clone(), token)?;
        signals::forward(urgent.clone())?;
        let machine = Coordinator::new(config, monotonic_ns());
        std::thread::Builder::new()
            .name("hgct-coordinator".into())
            .spawn(move || drive(machine, &inbox, &outbox, connections))?;
        Ok(Self { events, urgent, updates, queued, address, outcome: None })
    }

    /// Where agents join.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Gives a command; waits while agents have too much to read.
    pub(crate) fn command(&self, command: Command) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.queued.load(Ordering::Relaxed) > MAX_QUEUED_BYTES {
            if Instant::now() > deadline {
                bail!("an agent did not read for a minute");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // A machine that has ended takes no more; its last update says so.
        let _ = self.events.send(Event::Command { command: Box::new(command) });
        Ok(())
    }

    /// The next update; an error once the run has ended, or if nothing comes until the deadline.
    pub(crate) fn update(&mut self, within: Duration) -> Result<Update> {
        match self.poll(within)? {
            Some(update) => Ok(update),
            None => bail!("the coordinator said nothing for {} s", within.as_secs()),
        }
    }

    /// The next update, or `None` if none comes in time.
    pub(crate) fn poll(&mut self, within: Duration) -> Result<Option<Update>> {
        match self.updates.recv_timeout(within) {
            Ok(Update::Ended { outcome }) => {
                self.outcome = Some(outcome.clone());
                Err(Ended(outcome).into())
            }
            Ok(Update::Rejected { command, reason }) => bail!("the coordinator refused {command}: {reason}"),
            Ok(update) => Ok(Some(update)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the coordinator's thread has ended"),
        }
    }

    /// Ends everything in order and waits for it: all agents and workers are gone afterwards.
    pub(crate) fn end(self) -> Result<Outcome> {
        if let Some(outcome) = self.outcome {
            return Ok(outcome);
        }
        // A machine that has ended takes no more; its last update says so.
        let _ = self.urgent.give(Command::End);
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            // Nothing else counts any more, not even that a command before was refused.
            match self.updates.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Update::Ended { outcome }) => return Ok(outcome),
                Ok(_) if Instant::now() < deadline => {}
                Ok(_) | Err(RecvTimeoutError::Timeout) => bail!("the agents did not leave within 15 s"),
                Err(RecvTimeoutError::Disconnected) => bail!("the coordinator's thread has ended"),
            }
        }
    }
}

/// The run has ended; carried as an error through the driver.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Ended(pub(crate) Outcome);

/// The machine's thread. It never waits for the driver, which may be planning or writing to a disk:
/// heartbeats would stop and agents leave.
fn drive(
    mut machine: Coordinator,
    inbox: &Inbox,
    updates: &SyncSender<Update>,
    mut connections: Connections,
) {
    let mut outgoing = Outgoing::default();
    loop {
        while let Some(effect) = machine.poll_effect() {
            match effect {
                Effect::Send { connection, envelope, payload } => {
                    connections.send(connection, &envelope, payload);
                }
                Effect::Close { connection, reason } => connections.close(connection, &reason),
                Effect::Update(update) => outgoing.push(*update),
            }
        }
        if outgoing.hand_over(updates).is_err() {
            // A driver that has left wants nothing more than the end of everything.
            machine.handle(monotonic_ns(), Event::Command { command: Box::new(Command::End) });
            continue;
        }
        let Some(at_ns) = machine.poll_timeout() else {
            outgoing.hand_over_all(updates);
            return;
        };
        let mut wait = Duration::from_nanos(at_ns.saturating_sub(monotonic_ns()));
        if !outgoing.is_empty() {
            wait = wait.min(ROOM);
        }
        let Ok(event) = inbox.next(wait, outgoing.is_full()) else { return };
        connections.before(&event);
        machine.handle(monotonic_ns(), event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_heard_over_a_queue_that_is_full() {
        let (events, inbox) = sync_channel(1);
        let (urgent, inbox) = urgent::join(&events, inbox);
        let (outbox, updates) = sync_channel(1);
        // Nobody reads events before the end, as while a driver is behind.
        events.send(Event::Tick).unwrap();
        outbox.send(Update::Running).unwrap();
        let queued = Arc::new(AtomicU64::new(2 * MAX_QUEUED_BYTES));
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let shell = Shell { events, urgent, updates, queued, address, outcome: None };
        let (said, ended) = sync_channel(1);
        std::thread::spawn(move || said.send(shell.end()));
        let deadline = Instant::now() + Duration::from_secs(10);
        while inbox.next(Duration::from_millis(1), true).unwrap() == Event::Behind {
            assert!(Instant::now() < deadline, "nobody heard of the end");
        }
        outbox.send(Update::Ended { outcome: Outcome::Completed }).unwrap();
        let outcome = ended.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(outcome, Outcome::Completed);
    }
}
