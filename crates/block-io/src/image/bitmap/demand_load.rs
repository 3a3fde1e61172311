//! Reads the bitmaps of a chain into its map on demand, so that opening a large disk reads none of
//! them.

use std::io;
use std::ops::Range;

use cow_format::{LayerMap, SectorRange};

use super::source::BitmapSource;
use crate::storage::Storage;

/// Bitmap pages that are read at once (64 KiB, covering 256 MiB of disk): neighbouring pages are
/// likely to be needed soon, and a read of this size takes no longer than one of a page.
const GROUP: u64 = 16;

/// A layer, counted from 0 for the top, whose bitmap could not be read.
pub(crate) type Failed = (usize, io::Error);

/// The COW files of a chain, the top first, each with the source of its bits.
pub(crate) type Sources<'a, F> = [(&'a F, &'a BitmapSource<F>)];

/// Loads what is not yet known of `range` into `map`.
pub(crate) fn demand_load<F: Storage>(
    map: &LayerMap,
    sources: &Sources<'_, F>,
    range: SectorRange,
) -> Result<(), Failed> {
    while let Some(page) = map.next_unknown(range) {
        // What is known of the top is in its bitmap.
        if map.top().is_some_and(|top| !top.is_known(page)) {
            load_top_group(map, sources, page)?;
        }
        if !map.is_folded(page) {
            load_below_group(map, sources, page)?;
        }
    }
    Ok(())
}

/// Loads what is not yet known of `range` into the top's bitmap.
pub(crate) fn demand_load_top<F: Storage>(
    map: &LayerMap,
    sources: &Sources<'_, F>,
    range: SectorRange,
) -> Result<(), Failed> {
    while let Some(page) = map.top().and_then(|top| top.next_unknown(range)) {
        load_top_group(map, sources, page)?;
    }
    Ok(())
}

fn load_top_group<F: Storage>(
    map: &LayerMap,
    sources: &Sources<'_, F>,
    page: u64,
) -> Result<(), Failed> {
    let (Some(top), Some((file, bits))) = (map.top(), sources.first()) else { return Ok(()) };
    let region = map.region_of(page);
    if !bits.may_have(file, &region).map_err(|err| (0, err))? {
        top.set_known(region);
        return Ok(());
    }
    in_group(&region, page, |pages| bits.load(file, top, pages).map_err(|err| (0, err)))
}

fn load_below_group<F: Storage>(
    map: &LayerMap,
    sources: &Sources<'_, F>,
    page: u64,
) -> Result<(), Failed> {
    let region = map.region_of(page);
    let below = || sources.iter().enumerate().skip(1);
    if !map.is_region_begun(page) {
        let has = below()
            .map(|(layer, (file, bits))| bits.may_have(file, &region).map_err(|err| (layer, err)));
        let has = has.collect::<Result<Vec<_>, _>>()?;
        map.begin_region(page, |index| has.get(index).is_some_and(|has| *has));
        if map.is_folded(page) {
            return Ok(());
        }
    }
    in_group(&region, page, |pages| {
        let mut folds: Vec<_> = pages.clone().map(|page| map.fold(page)).collect();
        for (layer, (file, bits)) in below().rev() {
            // The end of a layer matters even if the layer has no sector here.
            folds.iter_mut().for_each(|fold| fold.overlay(layer - 1, &[]));
            let overlay = |page: u64, bytes: &[u8], _live| {
                let fold =
                    usize::try_from(page - pages.start).ok().and_then(|at| folds.get_mut(at));
                if let Some(fold) = fold {
                    fold.overlay(layer - 1, bytes);
                }
            };
            bits.for_each(file, &pages, overlay).map_err(|err| (layer, err))?;
        }
        folds.into_iter().for_each(|fold| fold.publish());
        Ok(())
    })
}

/// Reads the group of `page`, or, if that fails, the page alone: the unreadable page may be another
/// one than the one requested.
fn in_group(
    region: &Range<u64>,
    page: u64,
    read: impl Fn(Range<u64>) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let first = page / GROUP * GROUP;
    read(first..(first + GROUP).min(region.end)).or_else(|_| read(page..page + 1))
}
