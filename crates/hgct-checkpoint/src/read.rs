//! Resharding: any row ranges out of shards that were cut at any others.

use std::collections::BTreeMap;

use hgct_core::dtype::DType;
use hgct_core::slice::{Role, Slice};

use crate::checkpoints::{Checkpoint, folder};
use crate::store::Object;
use crate::{CHUNK_BYTES, Error, Result};

/// A part of a wanted slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index of the wanted slice.
    pub wanted: usize,
    /// Which rows; those of one wanted slice follow each other.
    pub slice: Slice,
    /// Its role.
    pub role: Role,
    /// Row-major little-endian f32, at most [`CHUNK_BYTES`].
    pub bytes: Vec<u8>,
}

/// Where some rows are: shard, entry.
#[derive(Clone, Copy)]
struct Place {
    shard: usize,
    entry: usize,
}

/// Gives wanted slices piece by piece, in the order in which they were asked for.
pub struct SliceReader<'a> {
    checkpoint: &'a Checkpoint,
    wanted: Vec<(Slice, Role)>,
    /// By role and tensor, the places in order of their first row.
    places: BTreeMap<(Role, &'a str), Vec<Place>>,
    /// Wanted slice and row of the next piece.
    next: (usize, u64),
    open: Option<(usize, Box<dyn Object>)>,
}

impl Checkpoint {
    /// Reads slices, each a row range of a tensor, wherever they lie. [`Error::Slice`] where one is
    /// not in the checkpoint, before anything is read.
    pub fn read_slices(&self, wanted: &[(Slice, Role)]) -> Result<SliceReader<'_>> {
        let mut places: BTreeMap<(Role, &str), Vec<Place>> = BTreeMap::new();
        for (shard, of_shard) in self.manifest.shards.iter().enumerate() {
            for (entry, e) in of_shard.entries.iter().enumerate() {
                places.entry((e.role, &e.slice.tensor)).or_default().push(Place { shard, entry });
            }
        }
        for of_tensor in places.values_mut() {
            of_tensor.sort_by_key(|place| self.slice(*place).begin[0]);
        }
        let reader =
            SliceReader { checkpoint: self, wanted: wanted.to_vec(), places, next: (0, 0), open: None };
        for (slice, role) in wanted {
            reader.check(slice, *role)?;
        }
        Ok(reader)
    }

    /// Reads one slice whole, as f32.
    pub fn read_f32(&self, slice: &Slice, role: Role) -> Result<Vec<f32>> {
        let mut elements = Vec::new();
        for piece in self.read_slices(&[(slice.clone(), role)])? {
            let bytes = piece?.bytes;
            elements.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        Ok(elements)
    }

    fn slice(&self, place: Place) -> &Slice {
        &self.manifest.shards[place.shard].entries[place.entry].slice
    }
}

impl SliceReader<'_> {
    /// A manifest holds each role whole or not at all, so a row range inside of the tensor is there.
    fn check(&self, slice: &Slice, role: Role) -> Result<()> {
        let fail = |reason: String| Err(Error::Slice { slice: slice.clone(), role, reason });
        let Some((first, last)) = self
            .places
            .get(&(role, slice.tensor.as_str()))
            .and_then(|places| Some((*places.first()?, *places.last()?)))
        else {
            return fail(format!("not in {}", self.checkpoint.path().display()));
        };
        let whole =
            Slice { end: self.checkpoint.slice(last).end.clone(), ..self.checkpoint.slice(first).clone() };
        let rows_of_it = slice.begin.len() == whole.begin.len()
            && slice.end.len() == whole.end.len()
            && slice.begin[0] < slice.end[0]
            && slice.end[0] <= whole.end[0]
            && slice.begin[1..] == whole.begin[1..]
            && slice.end[1..] == whole.end[1..];
        if !rows_of_it {
            return fail(format!("not a row range of {whole}"));
        }
        let dtypes = self.places[&(role, slice.tensor.as_str())]
            .iter()
            .map(|place| self.checkpoint.manifest.shards[place.shard].entries[place.entry].dtype);
        if let Some(other) = dtypes.into_iter().find(|dtype| *dtype != DType::F32) {
            let document = hgct_core::Error::NotYet {
                what: "a checkpoint's dtype",
                value: other.name().into(),
                instead: "f32",
            };
            return Err(document.into());
        }
        if row_bytes(slice) > CHUNK_BYTES as u64 {
            return fail(format!("a row of {} bytes is longer than a piece", row_bytes(slice)));
        }
        Ok(())
    }

    /// The piece that begins at `row` of a wanted slice.
    fn read(&mut self, wanted: usize, row: u64) -> Result<Piece> {
        let (slice, role) = self.wanted[wanted].clone();
        let places = self.places.get(&(role, slice.tensor.as_str())).map_or(&[][..], Vec::as_slice);
        let after = places.partition_point(|place| self.checkpoint.slice(*place).begin[0] <= row);
        let Some(place) = after.checked_sub(1).map(|at| places[at]) else {
            return Err(Error::Slice { slice, role, reason: format!("row {row} is nowhere") });
        };
        let source = self.checkpoint.slice(place);
        let row_bytes = row_bytes(&slice);
        let most = (CHUNK_BYTES as u64 / row_bytes).max(1);
        let end = slice.end[0].min(source.end[0]).min(row + most);
        let offset = self.checkpoint.places[place.shard][place.entry] + (row - source.begin[0]) * row_bytes;
        let mut bytes = vec![0; ((end - row) * row_bytes) as usize];
        self.object(place.shard)?.read_range(offset, &mut bytes)?;
        let mut part = slice;
        part.begin[0] = row;
        part.end[0] = end;
        Ok(Piece { wanted, slice: part, role, bytes })
    }

    /// A shard, opened; one at a time, since there can be more than a process may have open.
    fn object(&mut self, shard: usize) -> Result<&mut dyn Object> {
        let open = match self.open.take() {
            Some(open) if open.0 == shard => open,
            _ => {
                let manifest = &self.checkpoint.manifest;
                let name = format!("{}/{}", folder(manifest.step), manifest.shards[shard].file);
                (shard, self.checkpoint.store.open(&name)?)
            }
        };
        Ok(self.open.insert(open).1.as_mut())
    }
}

impl Iterator for SliceReader<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let (wanted, row) = self.next;
        let (slice, _) = self.wanted.get(wanted)?;
        let row = row.max(slice.begin[0]);
        let end = slice.end[0];
        let piece = self.read(wanted, row);
        self.next = match &piece {
            Ok(piece) if piece.slice.end[0] < end => (wanted, piece.slice.end[0]),
            Ok(_) => (wanted + 1, 0),
            // Nothing after an error.
            Err(_) => (self.wanted.len(), 0),
        };
        Some(piece)
    }
}

fn row_bytes(slice: &Slice) -> u64 {
    slice.begin.iter().zip(&slice.end).skip(1).map(|(b, e)| e - b).product::<u64>() * DType::F32.size_bytes()
}
