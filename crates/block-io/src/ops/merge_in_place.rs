//! Merging a COW file into a file below it.
//!
//! After every step the disk has the same content, whenever the power fails: until the last change
//! the COW file keeps everything, so it does not matter how much of that the target has as well.
//! The COW file must match its target again, however, or a marker must explain why it does not (see
//! [`super::merge_marker`]); then the merge can be run again.
//!
//! 1. The COW file's bits are made durable; the note is written.
//! 2. A layer gets its next content generation: other files over it become invalid. (A base becomes
//!    so by its mtime.)
//! 3. The data is copied and synced; a layer's bits are set and synced; a base gets its new mtime.
//! 4. The COW file's header refers to the target as it is now.
//! 5. The COW file's bits are cleared, and when that is durable its data is punched out. The note
//!    goes.

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cow_format::header::{Backing, BackingFormat, NativeState};
use cow_format::identity::{BackingIdentity, Timestamp};
use cow_format::{
    Bitmap, ByteOffset, Extent, Geometry, Header, LayerMap, SECTOR_SIZE, Sector, SectorCount,
    SectorRange,
};

use super::holes::Holes;
use super::merge_marker::MergeMarker;
use super::reset::empty;
use super::zeroes::for_each_run;
use super::{Copying, OpError, parallel};
use crate::image::bitmap::demand_load::demand_load;
use crate::image::bitmap::source::BitmapSource;
use crate::image::chain::{Content, Lower, Opener, Reference, path_to_store, reference};
use crate::image::identity::identity_of;
use crate::image::open::new_map;
use crate::image::opened::Opened;
use crate::image::references::Below;
use crate::image::trust::{Trust, recover};
use crate::image::write::flush::flush;
use crate::image::write::header_io::{set_backing_path, settle, write_native_synced};
use crate::image::{CowFormat, DiskOptions, ImageError};
use crate::storage::{Env, FileKind, Storage};

/// Bytes that are copied at once.
const BUFFER: usize = 1 << 20;

/// The result of a merge in place.
#[derive(Debug)]
pub struct Merged {
    /// The file that now has everything.
    pub target: PathBuf,
    /// The COW file is empty and refers to the target as it is now. If false (its header is of a
    /// version that is never written), it is unchanged and no longer matches.
    pub emptied: bool,
}

/// Merges the COW file at `cow`, and the files in between, into the file `depth` files below it (1
/// is the nearest). `base` replaces the path in its header. Can be run again after an interruption.
pub fn merge_in_place<E: Env>(
    env: &E,
    cow: &Path,
    base: Option<&Path>,
    depth: NonZeroUsize,
    copying: Copying<'_>,
) -> Result<Merged, OpError> {
    let mut merge = Merge::open(env, cow, base, depth)?;
    if merge.empty {
        // The target does not change; a marker, or data that is not marked present, is left from a
        // merge that was almost complete.
        merge.settle()?;
        if !merge.between.is_empty() {
            merge.refer()?;
        }
        if !is_read_only(&merge.header) {
            empty(env, &merge.top, &merge.header)?;
        }
        merge.marker.remove(env)?;
        return Ok(Merged { target: merge.target.opened.path.clone(), emptied: true });
    }
    merge.settle()?;
    merge.marker.write(env)?;
    merge.renew_layer()?;
    merge.make_room()?;
    merge.copy(copying)?;
    merge.publish()?;
    let emptied = merge.refer()?;
    if emptied {
        empty(env, &merge.top, &merge.header)?;
    }
    merge.marker.remove(env)?;
    Ok(Merged { target: merge.target.opened.path.clone(), emptied })
}

/// A merge in progress: all files open and locked, the COW file and the target exclusively.
struct Merge<'a, E: Env> {
    env: &'a E,
    top: Opened<E::File>,
    header: Header,
    /// The files in between.
    between: Vec<Lower<E::File>>,
    /// There is nothing to merge: neither the top nor the files in between have a sector.
    empty: bool,
    /// If the target is a layer.
    bitmap: Option<Bitmap>,
    target: Lower<E::File>,
    /// The identity of the target in the header above it.
    stored: BackingIdentity,
    map: LayerMap,
    marker: MergeMarker,
}

impl<'a, E: Env> Merge<'a, E> {
    fn open(
        env: &'a E,
        cow: &Path,
        base: Option<&Path>,
        depth: NonZeroUsize,
    ) -> Result<Self, OpError> {
        let options = DiskOptions::default();
        let mut opener = Opener::new(env, &options, cow);
        let top = opener.top()?;
        let mut header = top.header()?;
        if matches!(&header, Header::Native(native) if native.state() == NativeState::Frozen) {
            return Err(ImageError::Frozen { path: cow.to_owned() }.into());
        }
        let trust = recover(env, &top, &mut header)?;
        let real = env.canonical(cow).map_err(OpError::io(cow, "resolve"))?;
        let marker = |reference: &Reference, target: &Opened<E::File>| {
            MergeMarker::new(&real, &top.stat, &target.stat, &reference.identity)
        };
        let interrupted = |reference: &Reference, target: &Opened<E::File>| {
            marker(reference, target).exists(env).unwrap_or(false)
        };
        let named = base.map(|base| Below::Named(base.to_owned()));
        let mut opener = opener.writing(depth.get() - 1, &interrupted).naming(named);
        let mut below = opener.below(cow, &header)?;
        let map = whole_map(env, &top, &header, &below, trust)?;
        below.truncate(depth.get());
        let above = below.len().checked_sub(2).and_then(|above| below.get(above));
        let stored = match above {
            Some(above) => above.header.as_ref().and_then(reference),
            None => reference(&header),
        };
        let (true, Some(target), Some(stored)) = (below.len() == depth.get(), below.pop(), stored)
        else {
            return Err(OpError::NothingBelow { path: cow.to_owned(), depth: depth.get() });
        };
        check_target(&header, &target)?;
        let marker = marker(&stored, &target.opened);
        let stored = stored.identity;
        let bitmap = bitmap_of(&target)?;
        let mut empty = map.top().is_none_or(is_empty);
        for lower in &below {
            empty &= bitmap_of(lower)?.as_ref().is_none_or(is_empty);
        }
        let between = below;
        Ok(Merge { env, top, header, between, empty, bitmap, target, stored, map, marker })
    }

    /// Makes everything in the COW file durable, and its state clean.
    fn settle(&mut self) -> Result<(), OpError> {
        if let Some(bitmap) = self.map.top()
            && !is_read_only(&self.header)
        {
            settle(&self.top, &mut self.header, bitmap)?;
        }
        Ok(())
    }

    /// Shows the files over a layer that its content is about to change.
    fn renew_layer(&mut self) -> Result<(), OpError> {
        if let Some(Header::Native(native)) = &mut self.target.header {
            let path = &self.target.opened.path;
            native.renew_content().map_err(ImageError::header(path))?;
            let written = write_native_synced(&self.target.opened.file, native);
            written.map_err(|err| err.at(path))?;
        }
        Ok(())
    }

    /// Extends a base that is shorter than the disk.
    fn make_room(&self) -> Result<(), OpError> {
        let size = self.header.geometry().virtual_size();
        let target = &self.target.opened;
        if self.target.header.is_none() && target.stat.size < size {
            target.file.set_len(size).map_err(OpError::io(&target.path, "lengthen"))?;
        }
        Ok(())
    }

    fn copy(&self, copying: Copying<'_>) -> Result<(), OpError> {
        let state = || (vec![Holes::default(); self.between.len() + 1], vec![0; BUFFER]);
        let work = |(holes, buf): &mut (Vec<Holes>, Vec<u8>), range: SectorRange| {
            let mut at = range.start_bytes().get();
            for extent in self.map.extents(range) {
                let len = match extent {
                    Extent::Data { layer, at: from, len } if layer.get() < holes.len() => {
                        let source = (self.layer(layer.get()), &mut holes[layer.get()], from);
                        self.copy_data(source, at, len, copying, buf)?;
                        len
                    }
                    Extent::Data { len, .. } => len,
                    Extent::Zero { len } => {
                        self.zero(at, len)?;
                        len
                    }
                };
                at += len;
            }
            (copying.progress)(range.len_bytes());
            Ok(())
        };
        // One thread, since writes through the page cache are serialised.
        parallel::for_each_piece(self.map.sectors(), NonZeroUsize::MIN, state, work)
    }

    fn layer(&self, index: usize) -> &Opened<E::File> {
        match index.checked_sub(1) {
            None => &self.top,
            Some(index) => &self.between[index].opened,
        }
    }

    /// Copies `len` bytes to byte `at` of the disk.
    fn copy_data(
        &self,
        (source, holes, from): (&Opened<E::File>, &mut Holes, ByteOffset),
        at: u64,
        len: u64,
        copying: Copying<'_>,
        buf: &mut [u8],
    ) -> Result<(), OpError> {
        let mut done = 0;
        while done < len {
            let place = from.get() + done;
            let read = OpError::read(&source.path, place);
            let (part, hole) = holes.stretch(&source.file, place, len - done).map_err(read)?;
            if hole {
                self.zero(at + done, part)?;
                done += part;
                continue;
            }
            let n = usize::try_from(part).map_or(buf.len(), |part| part.min(buf.len()));
            let read = OpError::read(&source.path, place);
            source.file.read_exact_at(&mut buf[..n], ByteOffset::new(place)).map_err(read)?;
            for_each_run(&buf[..n], at + done, |run, zero| {
                let at = at + done + run.start as u64;
                match zero && copying.detect_zeroes {
                    true => self.zero(at, run.len() as u64),
                    false => self.write(at, &buf[run]),
                }
            })?;
            done += n as u64;
        }
        self.insert(at, len);
        Ok(())
    }

    /// The offset in the target of byte `at` of the disk.
    fn place(&self, at: u64) -> u64 {
        match &self.target.content {
            Content::Raw => at,
            Content::Cow(geometry, _) => geometry.data_offset().get() + at,
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), OpError> {
        // The last sector may be partial: a base must not become longer.
        let left = self.header.geometry().virtual_size().saturating_sub(at);
        let len = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
        let (target, place) = (&self.target.opened, self.place(at));
        let written = target.file.write_all_at(&bytes[..len], ByteOffset::new(place));
        written.map_err(OpError::write(&target.path, place))
    }

    fn zero(&self, at: u64, len: u64) -> Result<(), OpError> {
        let (target, place) = (&self.target.opened, self.place(at));
        // What lies beyond the old end of a base is zeros already.
        let end = target.stat.size.saturating_sub(place).min(len);
        let zeroed = target.file.punch(ByteOffset::new(place), end);
        zeroed.map_err(OpError::write(&target.path, place))?;
        self.insert(at, len);
        Ok(())
    }

    /// Sets the bits of a layer, in memory.
    fn insert(&self, at: u64, len: u64) {
        if let Some(bitmap) = &self.bitmap
            && let Some(range) =
                SectorRange::new(Sector::new(at / SECTOR_SIZE), SectorCount::covering(len))
        {
            bitmap.insert(range);
        }
    }

    /// Makes the target durable, and distinguishable from its former state.
    fn publish(&mut self) -> Result<(), OpError> {
        let target = &mut self.target.opened;
        match (&self.target.content, &self.bitmap) {
            (Content::Cow(geometry, _), Some(bitmap)) => make_durable(target, bitmap, geometry)?,
            _ => {
                target.file.sync().map_err(OpError::io(&target.path, "sync"))?;
                let now = target.file.stat().map_err(OpError::io(&target.path, "stat"))?.mtime;
                let mtime = other_second(now, &self.stored);
                target.file.stamp(mtime).map_err(OpError::io(&target.path, "set the mtime of"))?;
            }
        }
        target.stat = target.file.stat().map_err(OpError::io(&target.path, "stat"))?;
        Ok(())
    }

    /// Makes the COW file's header refer to the target as it is now; returns false if such a header
    /// is never written.
    fn refer(&mut self) -> Result<bool, OpError> {
        if is_read_only(&self.header) {
            return Ok(false);
        }
        let (top, target) = (&self.top, &self.target.opened);
        let format = CowFormat::of(&self.header);
        let path = path_to_store(self.env, &top.path, &target.path, format)?;
        let path = path.as_os_str().as_bytes();
        let written = match &mut self.header {
            Header::Uml(_) => {
                set_backing_path(&top.file, &mut self.header, path, target.stat.mtime)
            }
            Header::Native(native) => {
                let format = match &self.target.header {
                    Some(_) => BackingFormat::Native,
                    None => BackingFormat::Raw,
                };
                let identity = identity_of(target, self.target.header.as_ref())?;
                // A digest would be that of the former content.
                let backing = Backing::new(path, format, identity, None);
                native.set_backing(Some(backing.map_err(ImageError::header(&top.path))?));
                write_native_synced(&top.file, native)
            }
        };
        written.map_err(|err| err.at(&top.path))?;
        Ok(true)
    }
}

/// The map of the whole chain, fully loaded.
fn whole_map<E: Env>(
    env: &E,
    top: &Opened<E::File>,
    header: &Header,
    below: &[Lower<E::File>],
    trust: Trust,
) -> Result<LayerMap, ImageError> {
    let geometry = header.geometry();
    let bits = BitmapSource::find(env, top, header, trust)?;
    bits.check_data(top)?;
    let map = new_map(top, below, geometry, Bitmap::unknown(geometry.sectors()), false)?;
    let lowers = below.iter().filter_map(|lower| match &lower.content {
        Content::Raw => None,
        Content::Cow(_, bits) => Some((&lower.opened.file, bits)),
    });
    let sources: Vec<_> = std::iter::once((&top.file, &bits)).chain(lowers).collect();
    demand_load(&map, &sources, geometry.all()).map_err(|(layer, source)| {
        let lower = layer.checked_sub(1).and_then(|index| below.get(index));
        let path = lower.map_or(&top.path, |lower| &lower.opened.path);
        ImageError::io(path, "read the bitmap")(source)
    })?;
    Ok(map)
}

fn bitmap_of<F: Storage>(lower: &Lower<F>) -> Result<Option<Bitmap>, ImageError> {
    match &lower.content {
        Content::Raw => Ok(None),
        Content::Cow(_, bits) => bits.load_all(&lower.opened).map(Some),
    }
}

fn is_empty(bitmap: &Bitmap) -> bool {
    bitmap.present().get() == 0
}

/// Refuses a target that cannot be written without changing what it is.
fn check_target<F: Storage>(header: &Header, target: &Lower<F>) -> Result<(), OpError> {
    let refuse = |why| OpError::CannotTake { path: target.opened.path.clone(), why };
    let size = header.geometry().virtual_size();
    match &target.header {
        Some(Header::Uml(_)) => {
            Err(refuse("is a UML COW file, and other files may identify it by its mtime"))
        }
        Some(Header::Native(native)) if native.geometry().virtual_size() < size => {
            Err(refuse("is smaller than the disk"))
        }
        None if target.opened.stat.kind == FileKind::BlockDevice
            && target.opened.stat.size < size =>
        {
            Err(refuse("is a block device that is smaller than the disk"))
        }
        _ => Ok(()),
    }
}

fn is_read_only(header: &Header) -> bool {
    matches!(header, Header::Uml(uml) if uml.is_read_only())
}

fn make_durable<F: Storage>(
    file: &Opened<F>,
    bitmap: &Bitmap,
    geometry: &Geometry,
) -> Result<(), OpError> {
    Ok(flush(&file.file, bitmap, geometry).map_err(|failure| failure.at(&file.path))?)
}

/// `now`, or the second after it if a header with whole seconds could take it for the stored time.
fn other_second(now: Timestamp, stored: &BackingIdentity) -> Timestamp {
    let stored = match *stored {
        BackingIdentity::ImageSeconds { mtime_secs, .. } => i64::from(mtime_secs),
        BackingIdentity::Image { mtime, .. } => mtime.secs(),
        BackingIdentity::Layer { .. } => return now,
    };
    match now.secs() == stored {
        true => Timestamp::new(stored + 1, 0).unwrap_or(now),
        false => now,
    }
}
