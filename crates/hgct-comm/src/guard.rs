//! The door while nobody is expected: whoever knocks is heard out as far as the handshake goes, and
//! refused.
//!
//! Connections are taken while a mesh is made. Between meshes a stranger would wait in the system's
//! queue, unheard and unnoticed, and could fill it; and a rank that is already a generation further
//! would learn only at its deadline that this one is not.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use hgct_core::ids::{Generation, Rank, RunId};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::connect::nonce;
use crate::endpoint::Listener;
use crate::error::Refusal;
use crate::handshake::{Failure, Handshake, Identity, Progress};
use crate::key::{RunKey, run_digest};
use crate::time::{monotonic_ns, timespec};

/// A connection that does not prove itself within this time is closed.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Connections that may be in their handshake at once; the oldest makes room for a new one.
const MAX_STRANGERS: usize = 32;
/// Refusals of one sort that are told; a flood must not fill a log, nor hide another sort.
const MAX_TOLD: u32 = 100;

/// Whose door it is.
#[derive(Debug)]
pub struct GuardOptions<'a> {
    /// Where connections come in.
    pub listener: &'a Listener,
    /// This rank.
    pub me: Rank,
    /// All members of the generation, this rank too.
    pub members: Vec<Rank>,
    /// The generation that this rank is in.
    pub generation: Generation,
    /// The run.
    pub run: RunId,
    /// Its key.
    pub key: RunKey,
}

/// A thread that refuses whoever comes, until it is dropped: drop it before the next connect.
pub struct Guard {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

impl Guard {
    /// Begins; `told` hears who was refused and why, at most a hundred times for each
    /// sort of reason. A member that is a
    /// generation further is refused too, comes again, and is not told of.
    pub fn start(
        options: GuardOptions<'_>,
        told: impl FnMut(SocketAddr, &str) + Send + 'static,
    ) -> io::Result<Self> {
        let GuardOptions { listener, me, members, generation, run, key } = options;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let door = Door {
            sockets: listener.sockets.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?,
            stop: stop.try_clone()?,
            identity: Identity { me, members, generation, run: run_digest(&run), key },
            strangers: Vec::new(),
            told: Box::new(told),
            num_told: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new().name("hgct-guard".into()).spawn(move || door.keep())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Eight bytes always fit an event counter that is written once.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Hears who was refused, and why.
type Told = Box<dyn FnMut(SocketAddr, &str) + Send>;

struct Door {
    sockets: Vec<TcpListener>,
    stop: OwnedFd,
    identity: Identity,
    strangers: Vec<Stranger>,
    told: Told,
    num_told: BTreeMap<Sort, u32>,
}

/// Sorts of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sort {
    /// It said too little, or went away.
    Silent,
    /// Not our protocol, or not our version of it.
    Malformed,
    /// It cannot prove that it has the key.
    Key,
    /// It has the key and does not belong here.
    Unfit,
}

struct Stranger {
    stream: TcpStream,
    address: SocketAddr,
    handshake: Handshake,
    give_up_ns: u64,
}

impl Door {
    fn keep(mut self) {
        // A door that cannot be watched any more is as it was without a guard.
        while let Ok(false) = self.wait() {
            self.take_new();
            self.hear();
        }
    }

    /// Waits until somebody comes, says something or has run out; whether the guard is to stop.
    fn wait(&self) -> io::Result<bool> {
        let now_ns = monotonic_ns();
        let until_ns = self.strangers.iter().map(|stranger| stranger.give_up_ns).min();
        let timeout = until_ns.map(|until| timespec(Duration::from_nanos(until.saturating_sub(now_ns))));
        let doors = self.sockets.iter().map(AsFd::as_fd);
        let strangers = self.strangers.iter().map(|stranger| stranger.stream.as_fd());
        let all: Vec<BorrowedFd<'_>> =
            std::iter::once(self.stop.as_fd()).chain(doors).chain(strangers).collect();
        let mut polled: Vec<PollFd<'_>> =
            all.iter().map(|socket| PollFd::from_borrowed_fd(*socket, PollFlags::IN)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => Ok(!polled[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn take_new(&mut self) {
        for index in 0..self.sockets.len() {
            while let Ok((stream, address)) = self.sockets[index].accept() {
                let (Ok(()), Ok(nonce)) = (stream.set_nonblocking(true), nonce()) else { continue };
                if self.strangers.len() >= MAX_STRANGERS {
                    let evicted = self.strangers.remove(0);
                    self.tell(evicted.address, Sort::Silent, "silent while others waited");
                }
                let handshake = Handshake::accept(self.identity.clone(), nonce);
                let give_up_ns = monotonic_ns() + PATIENCE_NS;
                self.strangers.push(Stranger { stream, address, handshake, give_up_ns });
            }
        }
    }

    fn hear(&mut self) {
        let now_ns = monotonic_ns();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.advance() {
                Ok(None) if now_ns < stranger.give_up_ns => self.strangers.push(stranger),
                Ok(None) => self.tell(stranger.address, Sort::Silent, "it did not prove itself in time"),
                Ok(Some((sort, reason))) => self.tell(stranger.address, sort, &reason),
                // It moves on sooner than this rank, which is no offence.
                Err(Failure::Unfit(Refusal::Generation { theirs })) if theirs > self.identity.generation => {}
                Err(failure) => self.tell(stranger.address, Sort::of(&failure), &failure.text()),
            }
        }
    }

    fn tell(&mut self, address: SocketAddr, sort: Sort, why: &str) {
        let num_told = self.num_told.entry(sort).or_default();
        *num_told = num_told.saturating_add(1);
        match *num_told {
            ..MAX_TOLD => (self.told)(address, why),
            MAX_TOLD => (self.told)(address, &format!("{why}; more of them are not told")),
            _ => {}
        }
    }
}

impl Sort {
    fn of(failure: &Failure) -> Self {
        match failure {
            Failure::Malformed(_) | Failure::Version(_) => Self::Malformed,
            Failure::Key => Self::Key,
            Failure::Refused(_) | Failure::Unfit(_) => Self::Unfit,
        }
    }
}

impl Stranger {
    /// `None`: it may say more; else why it is sent away.
    fn advance(&mut self) -> Result<Option<(Sort, String)>, Failure> {
        let gone = |why: String| Ok(Some((Sort::Silent, why)));
        loop {
            // What it is told fits the empty buffer of a fresh connection.
            let output = std::mem::take(self.handshake.output());
            if self.stream.write_all(&output).is_err() {
                return gone("it does not listen".into());
            }
            let mut buffer = [0; 256];
            let wanted = self.handshake.wanted().min(buffer.len());
            match self.stream.read(&mut buffer[..wanted]) {
                Ok(0) => return gone("it went away inside of the handshake".into()),
                Ok(read) => match self.handshake.receive(&buffer[..read]) {
                    Ok(Progress::Wait) => {}
                    Ok(_) => {
                        return Ok(Some((Sort::Unfit, "it has the key, but all ranks are connected".into())));
                    }
                    Err(failure) => {
                        let _ = self.stream.write_all(self.handshake.output());
                        return Err(failure);
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return gone(error.to_string()),
            }
        }
    }
}
