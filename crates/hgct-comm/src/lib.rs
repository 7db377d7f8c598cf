//! What workers say to each other: transports, and the communicator over them.
//!
//! ```text
//!   worker ── send(peer, tag, memory) ──► Communicator ──► Transport: a queue and two threads a peer
//!   worker ◄── recv(peer, tag) ───────── mailbox ◄──────── Sink       tcp │ shared memory │ later more
//! ```
//!
//! - A [`Communicator`] belongs to one group and one generation. After an error it only says so until
//!   it is replaced. Every wait has a [`Deadline`].
//! - A send never waits for the wire. Messages go by [`Tag`], may be received in any order, and those
//!   of one tag keep theirs.
//! - Connections are authenticated in both directions before anything else is read: see
//!   `handshake.rs`. Traffic is not encrypted.
//! - A peer that ends without a goodbye is dead, and every wait says so at once.
//! - *Absent here*: an async runtime, a plan, knowledge of what a message means.
//!
//! ```
//! use std::time::Duration;
//! use hgct_comm::{Communicator, ConnectOptions, Deadline, Listener, Peer, RunKey, Tag, TagKind, Tuning};
//! use hgct_core::ids::{Generation, Rank, RunId};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let run = RunId::new("example")?;
//! let listeners = [Listener::bind(&["127.0.0.1:0".parse()?])?, Listener::none()];
//! let peer = |rank: u32| Peer {
//!     rank: Rank(rank),
//!     host_id: "here".into(),
//!     endpoints: listeners[rank as usize].endpoints(),
//! };
//! let connect = |rank: u32| {
//!     Communicator::connect(&ConnectOptions {
//!         group: vec![peer(0), peer(1)],
//!         me: Rank(rank),
//!         generation: Generation::default(),
//!         run: run.clone(),
//!         key: RunKey::derive(b"the token", &run),
//!         listener: &listeners[rank as usize],
//!         deadline: Deadline::after(Duration::from_secs(5)),
//!         shared_memory: true,
//!         test_delay_ns: 0,
//!         tuning: Tuning::default(),
//!     })
//! };
//! let tag = Tag::new(TagKind::User, 0, 0, 1);
//! let soon = Deadline::after(Duration::from_secs(5));
//! std::thread::scope(|scope| {
//!     let other = scope.spawn(|| -> hgct_comm::Result<()> {
//!         let communicator = connect(1)?;
//!         communicator.send(Rank(0), tag, vec![1.0f32, 2.0], soon)?;
//!         communicator.close(soon);
//!         Ok(())
//!     });
//!     let communicator = connect(0)?;
//!     assert_eq!(communicator.recv(Rank(1), tag, soon)?.as_f32(), Some(&[1.0, 2.0][..]));
//!     communicator.close(soon);
//!     other.join().map_err(|_| "the other rank panicked")??;
//!     Ok(())
//! })
//! # }
//! ```

mod buffer;
mod collectives;
mod communicator;
mod connect;
mod core;
mod endpoint;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod handshake;
#[cfg(test)]
mod hostile;
mod key;
mod link;
mod message;
mod record;
mod ring;
mod shm;
mod stream;
mod sync;
mod tag;
mod tcp;
mod ticket;
mod time;
pub mod transport;
mod wire;

pub use buffer::{ALIGNMENT, Pool, PooledBuffer, SendBuffer, bytes_f32, f32_bytes, f32_bytes_mut};
pub use collectives::ScalarOp;
pub use communicator::Communicator;
pub use connect::{ConnectOptions, Tuning};
pub use endpoint::{Endpoint, Listener, Peer};
pub use error::{Context, Error, Operation, Refusal, Result};
pub use guard::{Guard, GuardOptions};
pub use key::RunKey;
pub use link::LinkMeasurement;
pub use message::Received;
pub use record::{Direction, PeerStatistics, TransferRecord};
pub use tag::{Tag, TagKind};
pub use ticket::{SendState, SendTicket, Times};
pub use time::{Deadline, monotonic_ns};
pub use wire::{FrameKind, Header, MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
