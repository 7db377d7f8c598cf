//! Sharded checkpoints: safetensors shards, a manifest that is written last, resharding by slices.
//!
//! ```text
//! checkpoints/step-00000020/shard-r0.safetensors   what rank 0 owned: parameters, m, v
//! checkpoints/step-00000020/shard-r1.safetensors
//! checkpoints/step-00000020/manifest.json          there: every shard was written and verified
//! ```
//!
//! Update owners turn their slices into bytes with a [`ShardWriter`], in pieces of at most
//! [`CHUNK_BYTES`]. The coordinator puts the pieces into its [`Store`] with a [`CheckpointWriter`],
//! which commits by writing the manifest. [`Checkpoints`] finds the newest one that verifies; a
//! [`Checkpoint`] gives any slices in pieces, whatever rows the shards were cut at, so a run can go
//! on under another plan. No part holds more than a few pieces in memory.
//!
//! | Module | Holds |
//! | --- | --- |
//! | [`store`] | the storage interface: objects that appear whole or not at all |
//! | [`local`] | objects as files of a folder |
//! | [`disk`] | the file-system calls that a folder needs, so that tests can break them |
//! | [`testing`] | a disk in memory that runs out of space, writes short, or loses power |

mod checkpoints;
pub mod disk;
mod error;
mod export;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod inspect;
pub mod local;
mod read;
mod shard;
pub mod store;
pub mod testing;
mod writer;

#[cfg(test)]
extern crate self as hgct_checkpoint;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod fixture;

pub use checkpoints::{Bad, Checkpoint, Checkpoints, Newest};
pub use error::{Error, Result};
pub use export::{ExportOptions, ExportTokenizer, Exported, export_hf};
pub use inspect::{RoleSummary, ShardSummary, Summary};
pub use local::LocalStore;
pub use read::{Piece, SliceReader};
pub use shard::{Chunk, ShardWriter, shard_file};
pub use store::Store;
pub use writer::{CheckpointWriter, Committed};

/// Most bytes in one piece of a shard or of a slice.
pub const CHUNK_BYTES: usize = 1 << 20;
