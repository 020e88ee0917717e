ALTER TABLE "{message}" ADD COLUMN "parked_at" TIMESTAMPTZ;

ALTER TABLE "{message}" ADD COLUMN "cancelled_at" TIMESTAMPTZ;

ALTER TABLE "{tool_call}" ADD COLUMN "approval" TEXT
    CONSTRAINT "{tool_call}_approval_check" CHECK (approval IN ('required', 'approved', 'denied'));
