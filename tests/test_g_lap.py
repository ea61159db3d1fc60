import time
from tests.fix_migration import *
def test_lap(migration):
    t=time.time()
    def lap(w):
        nonlocal t; print(w, round(time.time()-t,2), flush=True); t=time.time()
    migration.prepare(); lap("prepare")
    migration.old.execute("update follows set note='x' where from_user=1"); migration.capture(); lap("capture")
    migration.backfill("store"); lap("bf store")
    migration.backfill("lake"); lap("bf lake")
    migration.replay("store"); lap("replay store")
    migration.replay("lake"); lap("replay lake")
    migration.old.execute("update follows set note='y' where from_user=1");migration.capture(); lap("capture")
    migration.replay("store"); lap("replay store")
    migration.replay("lake"); lap("replay lake")
    migration.assert_equal(); lap("equal")
    print(migration.abort()); lap("abort"); print(migration.leftovers())
